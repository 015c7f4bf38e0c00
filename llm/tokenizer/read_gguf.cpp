#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "llm/formats/gguf.h"
#include "llm/formats/quoted.h"
#include "llm/tokenizer/sentencepiece.h"
#include "llm/tokenizer/tokenizer_data.h"

namespace moba::llm {
namespace {

constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kDigit = R"(\p{N})";

/// The patterns of a name in `tokenizer.ggml.pre`, which split one after the other.
struct PreTokenizerKind {
  std::string_view name;
  std::array<const char*, 2> patterns;
  bool nfc = false;
  bool ignore_merges = false;
  bool add_bos = false;  // the default if the file has no value
};

constexpr std::array<PreTokenizerKind, 9> kKinds{{
    {"gpt-2", {kGpt2Pattern}},
    // Written by old converters: read as GPT-2, as `transformers` does.
    {"default", {kGpt2Pattern}},
    {"smollm", {kDigit, kGpt2Pattern}},
    {"starcoder", {kDigit, kGpt2Pattern}},
    {"llama-bpe", {kLlama3Pattern}, false, true, true},
    {"llama3", {kLlama3Pattern}, false, true, true},
    {"llama-v3", {kLlama3Pattern}, false, true, true},
    {"qwen2", {kQwen2Pattern}, true},
    {"deepseek-r1-qwen", {kQwen2Pattern}, true},
}};

bool flag(const GgufFile& file, const char* key, bool otherwise) {
  const auto value = file.find(key);
  return value ? value->boolean() : otherwise;
}

/// Returns the id under `key`, or -1.
std::int32_t token_id(const GgufFile& file, const char* key, const TokenizerData& data) {
  const auto value = file.find(key);
  if (!value) return -1;
  const std::int64_t id = value->integer();
  const auto count = static_cast<std::int64_t>(data.tokens.size());
  if (id < 0 || id >= count) value->fail(fmt::format("an id below {}", count), std::to_string(id));
  return static_cast<std::int32_t>(id);
}

/// Returns the kinds of the `count` tokens; all are plain if the file has no list.
std::vector<PieceKind> token_kinds(const GgufFile& file, std::size_t count) {
  const auto types = file.find("tokenizer.ggml.token_type");
  if (!types) return std::vector<PieceKind>(count, PieceKind::kNormal);
  std::vector<PieceKind> kinds;
  for (const std::int64_t number : types->integers()) kinds.push_back(piece_kind(number, types->where()));
  if (kinds.size() != count) types->fail(fmt::format("{} types", count), std::to_string(kinds.size()));
  return kinds;
}

const PreTokenizerKind& pre_tokenizer_kind(const GgufFile& file) {
  const auto pre = file.find("tokenizer.ggml.pre");
  const std::string_view name = pre ? pre->string() : "default";
  const auto kind = std::find_if(kKinds.begin(), kKinds.end(), [&](const auto& k) { return k.name == name; });
  if (kind != kKinds.end()) return *kind;
  std::string known;
  for (const auto& k : kKinds) known += fmt::format("{}{}", known.empty() ? "" : ", ", k.name);
  pre->fail(fmt::format("one of {}", known), llm::quoted(name));
}

bool is_special(PieceKind kind) {
  return kind == PieceKind::kControl || kind == PieceKind::kUnknown;
}

/// Returns a token of a byte-level model: in the byte alphabet, unless it is an added token.
void add_byte_level_token(std::string_view text, std::int32_t id, PieceKind kind, TokenizerData& data,
                          Bpe& bpe) {
  const bool found = is_special(kind) || kind == PieceKind::kUserDefined;
  Token& token = data.tokens[static_cast<std::size_t>(id)];
  if (found) {
    AddedToken added;
    added.id = id;
    added.text = text;
    added.special = is_special(kind);
    add_found_token(data, added);
  } else if (const auto bytes = bytes_of_characters(text)) {
    token.bytes = *bytes;
    if (bpe.ignore_merges) bpe.vocab.emplace(*bytes, id);
    if (bytes->size() == 1) bpe.byte_tokens[static_cast<unsigned char>(bytes->front())] = id;
  }
}

void read_merges(const GgufValue& merges, const TokenIds& ids, MergeTable& table) {
  const auto lines = merges.strings();
  table.reserve(lines.size());
  std::string merged;
  for (std::size_t rank = 0; rank < lines.size(); ++rank) {
    const std::string_view line = lines[rank];
    const std::size_t space = line.find(' ');
    if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
      merges.fail("two tokens with one space between", llm::quoted(line));
    }
    const auto id = [&](std::string_view text) {
      const auto it = ids.find(text);
      if (it == ids.end()) merges.fail("tokens of the vocabulary", llm::quoted(text));
      return it->second;
    };
    const std::string_view left = line.substr(0, space);
    const std::string_view right = line.substr(space + 1);
    const std::int32_t left_id = id(left);
    const std::int32_t right_id = id(right);
    merged.assign(left).append(right);
    table.set(left_id, right_id, {static_cast<std::int32_t>(rank), id(merged)});
  }
}

TokenizerData read_byte_level(const GgufFile& file) {
  const PreTokenizerKind& kind = pre_tokenizer_kind(file);
  const GgufValue list = file.at("tokenizer.ggml.tokens");
  const auto texts = list.strings();
  const auto kinds = token_kinds(file, texts.size());
  TokenizerData data;
  Bpe bpe;
  bpe.byte_level = true;
  bpe.ignore_merges = kind.ignore_merges;
  const std::string where = list.where();
  data.tokens.reserve(texts.size());
  data.ids.reserve(texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    const std::string text(texts[i]);
    const auto id = static_cast<std::int32_t>(i);
    const auto shown = is_special(kinds[i]) ? Token::Kind::kSpecial : Token::Kind::kText;
    place_token(data, id, {text, text, shown}, texts.size(), where);
    add_byte_level_token(text, id, kinds[i], data, bpe);
  }
  read_merges(file.at("tokenizer.ggml.merges"), data.ids, bpe.merges);
  data.model = std::move(bpe);
  if (kind.nfc) data.normalizer.emplace_back(UnicodeForm::kNfc);
  if (flag(file, "tokenizer.ggml.add_space_prefix", false)) data.pre_tokenizer.emplace_back(AddPrefixSpace{});
  for (const char* pattern : kind.patterns) {
    if (pattern != nullptr) data.pre_tokenizer.emplace_back(Split{Pattern::regex(pattern, file.name())});
  }
  data.bos = token_id(file, "tokenizer.ggml.bos_token_id", data);
  if (data.bos >= 0 && flag(file, "tokenizer.ggml.add_bos_token", kind.add_bos)) data.before = {data.bos};
  return data;
}

TokenizerData read_sentencepiece(const GgufFile& file) {
  const GgufValue list = file.at("tokenizer.ggml.tokens");
  const auto texts = list.strings();
  const auto kinds = token_kinds(file, texts.size());
  const GgufValue score_list = file.at("tokenizer.ggml.scores");
  const auto scores = score_list.numbers();
  if (scores.size() != texts.size()) {
    score_list.fail(fmt::format("{} scores", texts.size()), std::to_string(scores.size()));
  }
  std::vector<ScoredPiece> pieces;
  for (std::size_t i = 0; i < texts.size(); ++i)
    pieces.push_back({std::string(texts[i]), scores[i], kinds[i]});
  const bool space_prefix = flag(file, "tokenizer.ggml.add_space_prefix", true);
  TokenizerData data = sentencepiece_tokenizer(pieces, space_prefix, list.where());
  data.bos = token_id(file, "tokenizer.ggml.bos_token_id", data);
  if (data.bos >= 0 && flag(file, "tokenizer.ggml.add_bos_token", true)) data.before = {data.bos};
  return data;
}

}  // namespace

TokenizerData read_tokenizer_gguf(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  const GgufValue model = file.at("tokenizer.ggml.model");
  if (model.string() != "gpt2" && model.string() != "llama")
    model.fail("gpt2 or llama", llm::quoted(model.string()));
  TokenizerData data = model.string() == "gpt2" ? read_byte_level(file) : read_sentencepiece(file);
  const std::int32_t eos = token_id(file, "tokenizer.ggml.eos_token_id", data);
  if (eos >= 0 && flag(file, "tokenizer.ggml.add_eos_token", false)) data.after = {eos};
  add_end_token(data, eos);
  for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    add_end_token(data, token_id(file, key, data));
  }
  add_known_end_tokens(data);
  if (const auto source = file.find("tokenizer.chat_template")) data.chat_template = source->string();
  return data;
}

namespace {

using Json = nlohmann::ordered_json;

Json byte_level_json(bool add_prefix_space) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", add_prefix_space},
          {"trim_offsets", true},
          {"use_regex", false}};
}

Json pre_tokenizer_json(const PreTokenizerKind& kind, bool add_prefix_space) {
  Json steps = Json::array();
  for (const char* pattern : kind.patterns) {
    if (pattern == nullptr) continue;
    steps.push_back(
        {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  }
  steps.push_back(byte_level_json(add_prefix_space));
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

/// Returns a template that adds `before` and `after` around a text.
Json post_processor_json(const TokenizerData& data) {
  if (data.before.empty() && data.after.empty()) return nullptr;
  Json single = Json::array(), tokens = Json::object();
  const auto add = [&](std::int32_t id) {
    const std::string& text = data.tokens[static_cast<std::size_t>(id)].text;
    single.push_back({{"SpecialToken", {{"id", text}, {"type_id", 0}}}});
    tokens[text] = {{"id", text}, {"ids", {id}}, {"tokens", {text}}};
  };
  for (const std::int32_t id : data.before) add(id);
  single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
  for (const std::int32_t id : data.after) add(id);
  Json pair = single;
  pair.push_back({{"Sequence", {{"id", "B"}, {"type_id", 1}}}});
  return {{"type", "TemplateProcessing"}, {"single", single}, {"pair", pair}, {"special_tokens", tokens}};
}

}  // namespace

Json tokenizer_json_of_gguf(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  const GgufValue model = file.at("tokenizer.ggml.model");
  if (model.string() != "gpt2") model.fail("gpt2, a byte-level tokenizer", llm::quoted(model.string()));
  const TokenizerData data = read_tokenizer_gguf(path);
  const PreTokenizerKind& kind = pre_tokenizer_kind(file);
  const auto kinds = token_kinds(file, data.tokens.size());

  Json vocab = Json::object(), added = Json::array();
  for (std::size_t id = 0; id < data.tokens.size(); ++id) {
    const std::string& text = data.tokens[id].text;
    vocab[text] = id;
    if (!is_special(kinds[id]) && kinds[id] != PieceKind::kUserDefined) continue;
    added.push_back({{"id", id},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", is_special(kinds[id])}});
  }
  const bool add_prefix_space = flag(file, "tokenizer.ggml.add_space_prefix", false);
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", kind.nfc ? Json{{"type", "NFC"}} : Json(nullptr)},
          {"pre_tokenizer", pre_tokenizer_json(kind, add_prefix_space)},
          {"post_processor", post_processor_json(data)},
          {"decoder", byte_level_json(false)},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", kind.ignore_merges},
            {"vocab", vocab},
            {"merges", file.at("tokenizer.ggml.merges").strings()}}}};
}

}  // namespace moba::llm
