#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"
#include "llm/tokenizer/tokenizer_data.h"

namespace moba::llm {
namespace {

/// The largest known tokenizer files have about 40 MB.
constexpr std::size_t kLargestFile = std::size_t{1} << 29;

bool flag(const JsonValue& node, const char* key, bool otherwise) {
  const auto member = node.find(key);
  return member ? member->boolean() : otherwise;
}

std::string text_or(const JsonValue& node, const char* key, const std::string& otherwise) {
  const auto member = node.find(key);
  return member ? member->string() : otherwise;
}

template <class Visit>
void for_each(const JsonValue& list, const Visit& visit) {
  for (std::size_t i = 0; i < list.array().size(); ++i) visit(list.element(i));
}

[[noreturn]] void unsupported(const JsonValue& node, std::string_view supported) {
  node.at("type").fail(fmt::format("one of {}", supported), llm::quoted(node.at("type").string()));
}

/// Returns the members of a Sequence, or the component itself.
template <class Visit>
void for_each_component(const JsonValue& node, const std::string& list, const Visit& visit, int depth = 0) {
  constexpr int kDeepest = 8;
  if (node.at("type").string() == "Sequence") {
    if (depth == kDeepest) node.fail(fmt::format("sequences at most {} deep", kDeepest), "deeper ones");
    for_each(node.at(list),
             [&](const JsonValue& inner) { for_each_component(inner, list, visit, depth + 1); });
  } else {
    visit(node);
  }
}

Pattern read_pattern(const JsonValue& node) {
  if (const auto regex = node.find("Regex")) return Pattern::regex(regex->string(), regex->where());
  const JsonValue literal = node.at("String");
  if (literal.string().empty()) literal.fail("a text", "an empty one");
  return Pattern::literal(literal.string(), literal.where());
}

void read_normalizer_step(const JsonValue& node, Normalizer& steps) {
  const std::string& type = node.at("type").string();
  if (type == "NFC") {
    steps.emplace_back(UnicodeForm::kNfc);
  } else if (type == "NFD") {
    steps.emplace_back(UnicodeForm::kNfd);
  } else if (type == "NFKC") {
    steps.emplace_back(UnicodeForm::kNfkc);
  } else if (type == "NFKD") {
    steps.emplace_back(UnicodeForm::kNfkd);
  } else if (type == "Prepend") {
    steps.emplace_back(Prepend{node.at("prepend").string()});
  } else if (type == "Replace") {
    const JsonValue from = node.at("pattern").at("String");
    if (from.string().empty()) from.fail("a text", "an empty one");
    steps.emplace_back(Replace{from.string(), node.at("content").string()});
  } else {
    unsupported(node, "Sequence, NFC, NFD, NFKC, NFKD, Prepend, Replace");
  }
}

SplitBehavior read_behavior(const JsonValue& node) {
  const std::string& name = node.string();
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  node.fail("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous", llm::quoted(name));
}

Metaspace::Prepend read_prepend(const JsonValue& node) {
  const auto scheme = node.find("prepend_scheme");
  if (!scheme) {  // files older than the scheme
    return flag(node, "add_prefix_space", true) ? Metaspace::Prepend::kAlways : Metaspace::Prepend::kNever;
  }
  if (scheme->string() == "always") return Metaspace::Prepend::kAlways;
  if (scheme->string() == "first") return Metaspace::Prepend::kFirst;
  if (scheme->string() == "never") return Metaspace::Prepend::kNever;
  scheme->fail("always, first or never", llm::quoted(scheme->string()));
}

void read_metaspace(const JsonValue& node, PreTokenizer& steps) {
  const JsonValue mark = node.at("replacement");
  if (mark.string().empty()) mark.fail("a character", "an empty text");
  steps.emplace_back(Metaspace{mark.string(), read_prepend(node)});
  if (flag(node, "split", true)) {
    steps.emplace_back(Split{Pattern::literal(mark.string(), mark.where()), SplitBehavior::kMergedWithNext});
  }
}

/// Returns whether the model is byte-level.
bool read_pre_tokenizer(const JsonValue& root, PreTokenizer& steps) {
  bool byte_level = false;
  for_each_component(root, "pretokenizers", [&](const JsonValue& node) {
    if (byte_level) node.fail("nothing after ByteLevel", "another step");
    const std::string& type = node.at("type").string();
    if (type == "ByteLevel") {
      byte_level = true;
      if (flag(node, "add_prefix_space", true)) steps.emplace_back(AddPrefixSpace{});
      if (flag(node, "use_regex", true))
        steps.emplace_back(Split{Pattern::regex(kGpt2Pattern, node.where())});
    } else if (type == "Split") {
      steps.emplace_back(Split{read_pattern(node.at("pattern")), read_behavior(node.at("behavior")),
                               flag(node, "invert", false)});
    } else if (type == "Digits") {
      const char* digits = flag(node, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)";
      steps.emplace_back(Split{Pattern::regex(digits, node.where())});
    } else if (type == "Metaspace") {
      read_metaspace(node, steps);
    } else {
      unsupported(node, "Sequence, Split, ByteLevel, Digits, Metaspace");
    }
  });
  return byte_level;
}

void read_vocab(const JsonValue& vocab, std::size_t count, TokenizerData& data) {
  for (const auto& [text, id] : vocab.object()) {
    if (!id.is_number_integer())
      vocab.fail("an integer for every token", fmt::format("{} for {}", id.type_name(), llm::quoted(text)));
    place_token(data, id.get<std::int64_t>(), {text, text, Token::Kind::kText}, count, vocab.where());
  }
}

/// Returns the two halves of a merge, written as "a b" or as ["a", "b"].
std::pair<std::string, std::string> read_merge(const JsonValue& node) {
  if (const auto* text = node.value().get_ptr<const std::string*>()) {
    const std::size_t space = text->find(' ');
    if (space == std::string::npos || text->find(' ', space + 1) != std::string::npos) {
      node.fail("two tokens with one space between", llm::quoted(*text));
    }
    return {text->substr(0, space), text->substr(space + 1)};
  }
  if (node.array().size() != 2) node.fail("two tokens", std::to_string(node.array().size()));
  return {node.element(0).string(), node.element(1).string()};
}

bool is_version_line(const JsonValue& merge) {
  const auto* text = merge.value().get_ptr<const std::string*>();
  return text != nullptr && text->starts_with("#version");
}

void read_merges(const JsonValue& merges, const TokenIds& ids, MergeTable& table) {
  table.reserve(merges.array().size());
  std::int32_t rank = 0;
  for_each(merges, [&](const JsonValue& node) {
    if (is_version_line(node)) return;
    const auto [left, right] = read_merge(node);
    const auto id = [&](const std::string& text) {
      const auto it = ids.find(text);
      if (it == ids.end()) node.fail("tokens of the vocabulary", llm::quoted(text));
      return it->second;
    };
    const std::int32_t left_id = id(left);
    const std::int32_t right_id = id(right);
    table.set(left_id, right_id, {rank++, id(left + right)});
  });
}

Bpe read_bpe(const JsonValue& node, bool byte_level, TokenizerData& data) {
  if (text_or(node, "type", "BPE") != "BPE") unsupported(node, "BPE");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!text_or(node, affix, "").empty()) node.at(affix).fail("none", llm::quoted(node.at(affix).string()));
  }
  const auto dropout = node.find("dropout");
  if (dropout && dropout->value() != 0)
    dropout->fail("none: tokens would be random", dropout->value().dump());
  Bpe bpe;
  bpe.byte_level = byte_level;
  bpe.ignore_merges = flag(node, "ignore_merges", false);
  bpe.fuse_unknown = flag(node, "fuse_unk", false);
  read_merges(node.at("merges"), data.ids, bpe.merges);
  for (const auto& [text, id] : data.ids) {
    Token& token = data.tokens[static_cast<std::size_t>(id)];
    if (byte_level) {
      const auto bytes = bytes_of_characters(text);
      if (!bytes) continue;
      token.bytes = *bytes;
      if (bytes->size() == 1) bpe.byte_tokens[static_cast<unsigned char>(bytes->front())] = id;
    }
    bpe.vocab.emplace(token.bytes, id);
  }
  if (!byte_level && flag(node, "byte_fallback", false)) {
    for (const auto& [text, id] : data.ids) {
      if (const auto byte = byte_of_token(text)) bpe.byte_tokens[*byte] = id;
    }
  }
  if (const auto unknown = node.find("unk_token")) {
    const auto it = data.ids.find(unknown->string());
    if (it == data.ids.end()) unknown->fail("a token of the vocabulary", llm::quoted(unknown->string()));
    bpe.unknown = it->second;
  }
  return bpe;
}

/// The decoders of models that are not byte-level.
void read_decoder(const JsonValue& root, TokenizerData& data) {
  std::string mark;
  bool from_bytes = false;
  for_each_component(root, "decoders", [&](const JsonValue& node) {
    const std::string& type = node.at("type").string();
    if (type == "Replace") {
      const JsonValue content = node.at("content");
      if (content.string() != " ") content.fail("a space", llm::quoted(content.string()));
      mark = node.at("pattern").at("String").string();
    } else if (type == "Metaspace") {
      mark = node.at("replacement").string();
      data.strip_leading_space = read_prepend(node) != Metaspace::Prepend::kNever;
    } else if (type == "Strip") {
      data.strip_leading_space = node.at("start").integer() > 0;
    } else if (type == "ByteFallback") {
      from_bytes = true;
    } else if (type != "Fuse" && type != "ByteLevel") {
      unsupported(node, "Sequence, Replace, Metaspace, Strip, ByteFallback, Fuse, ByteLevel");
    }
  });
  for (Token& token : data.tokens) {
    if (token.kind != Token::Kind::kText) continue;
    const auto byte = byte_of_token(token.text);
    if (byte && from_bytes) {
      token.bytes = static_cast<char>(*byte);
    } else if (!mark.empty()) {
      token.bytes = replace_all(token.text, mark, " ");
    }
  }
}

void read_added_token(const JsonValue& node, std::size_t count, TokenizerData& data) {
  AddedToken token;
  token.text = node.at("content").string();
  token.special = flag(node, "special", false);
  token.single_word = flag(node, "single_word", false);
  token.left_strip = flag(node, "lstrip", false);
  token.right_strip = flag(node, "rstrip", false);
  token.normalized = flag(node, "normalized", !token.special);
  const std::int64_t id = node.at("id").integer();
  const auto kind = token.special ? Token::Kind::kSpecial : Token::Kind::kText;
  place_token(data, id, {token.text, token.text, kind}, count, node.where());
  token.id = static_cast<std::int32_t>(id);
  add_found_token(data, token);
}

/// Returns the tokens that a template adds around one text.
void read_template(const JsonValue& node, TokenizerData& data) {
  std::vector<std::int32_t> before;
  std::vector<std::int32_t> after;
  bool seen_text = false;
  for_each(node.at("single"), [&](const JsonValue& piece) {
    if (piece.find("Sequence")) {
      if (std::exchange(seen_text, true)) piece.fail("one Sequence", "another");
      return;
    }
    const JsonValue name = piece.at("SpecialToken").at("id");
    for_each(node.at("special_tokens").at(name.string()).at("ids"), [&](const JsonValue& id) {
      const std::int64_t value = id.integer();
      if (value < 0 || value >= static_cast<std::int64_t>(data.tokens.size())) {
        id.fail("an id of the vocabulary", std::to_string(value));
      }
      (seen_text ? after : before).push_back(static_cast<std::int32_t>(value));
    });
  });
  if (!seen_text) node.at("single").fail("a Sequence", "none");
  data.before.insert(data.before.begin(), before.begin(), before.end());
  data.after.insert(data.after.end(), after.begin(), after.end());
}

void read_post_processor(const JsonValue& root, TokenizerData& data) {
  for_each_component(root, "processors", [&](const JsonValue& node) {
    const std::string& type = node.at("type").string();
    if (type == "TemplateProcessing") {
      read_template(node, data);
    } else if (type != "ByteLevel") {
      unsupported(node, "Sequence, TemplateProcessing, ByteLevel");
    }
  });
}

/// Returns a token's text, a string or an object with its `content`.
std::string token_text(const JsonValue& node) {
  return node.value().is_object() ? node.at("content").string() : node.string();
}

/// Returns ids of a model's configuration; eos_token_id is a number or a list of numbers.
void read_config_ids(const JsonValue& config, TokenizerData& data) {
  const auto bos = config.find("bos_token_id");
  if (bos && data.bos < 0 && bos->integer() >= 0 &&
      bos->integer() < static_cast<std::int64_t>(data.tokens.size())) {
    data.bos = static_cast<std::int32_t>(bos->integer());
  }
  const auto ids = config.find("eos_token_id");
  if (!ids) return;
  if (ids->value().is_array()) {
    for_each(*ids, [&](const JsonValue& id) { add_end_token(data, id.integer()); });
  } else {
    add_end_token(data, ids->integer());
  }
}

/// Returns a template's source: a text, or a list of named ones of which `default` counts.
std::string read_chat_template(const JsonValue& node) {
  if (!node.value().is_array()) return node.string();
  std::string source;
  for_each(node, [&](const JsonValue& named) {
    if (named.at("name").string() == "default") source = named.at("template").string();
  });
  return source;
}

void read_tokenizer_config(const JsonValue& config, TokenizerData& data) {
  const auto id_of = [&](const char* key) {
    const auto node = config.find(key);
    if (!node) return std::int32_t{-1};
    const auto it = data.ids.find(token_text(*node));
    return it == data.ids.end() ? -1 : it->second;
  };
  if (const std::int32_t bos = id_of("bos_token"); bos >= 0) data.bos = bos;
  add_end_token(data, id_of("eos_token"));
  if (const auto node = config.find("chat_template")) data.chat_template = read_chat_template(*node);
}

/// Reads from the folder of a SentencePiece model whether texts begin with a BOS and end with an EOS.
void read_added_ends(const JsonValue& config, TokenizerData& data) {
  if (!flag(config, "add_bos_token", true)) data.before.clear();
  if (flag(config, "add_eos_token", false) && !data.end_tokens.empty())
    data.after = {data.end_tokens.front()};
}

std::string contents(const MappedFile& file) {
  return std::string(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
}

}  // namespace

TokenizerData read_tokenizer_json(const std::filesystem::path& file) {
  const nlohmann::json document = load_json(file, kLargestFile);
  const JsonValue root(document, file.string());
  const JsonValue model = root.at("model");
  const JsonValue vocab = model.at("vocab");
  const auto added = root.find("added_tokens");
  const std::size_t count = vocab.value().size() + (added ? added->array().size() : 0);

  TokenizerData data;
  if (const auto node = root.find("normalizer")) {
    for_each_component(*node, "normalizers",
                       [&](const JsonValue& step) { read_normalizer_step(step, data.normalizer); });
  }
  const auto pre_tokenizer = root.find("pre_tokenizer");
  const bool byte_level = pre_tokenizer && read_pre_tokenizer(*pre_tokenizer, data.pre_tokenizer);
  read_vocab(vocab, count, data);
  data.model = read_bpe(model, byte_level, data);
  if (const auto decoder = root.find("decoder")) {
    if (!byte_level) read_decoder(*decoder, data);
  }
  if (added) {
    for_each(*added, [&](const JsonValue& token) { read_added_token(token, count, data); });
  }
  if (const auto node = root.find("post_processor")) read_post_processor(*node, data);
  return data;
}

TokenizerData read_huggingface_folder(const std::filesystem::path& folder) {
  const bool has_json = std::filesystem::exists(folder / "tokenizer.json");
  if (!has_json && !std::filesystem::exists(folder / "tokenizer.model")) {
    throw DataError(
        fmt::format("{}: expected tokenizer.json or tokenizer.model, got neither", folder.string()));
  }
  TokenizerData data = has_json ? read_tokenizer_json(folder / "tokenizer.json")
                                : read_tokenizer_model(folder / "tokenizer.model");
  const auto read_if_there = [&](const char* name, const auto& read) {
    const auto file = folder / name;
    if (!std::filesystem::exists(file)) return;
    const nlohmann::json document = load_json(file, kLargestFile);
    read(JsonValue(document, file.string()), data);
  };
  read_if_there("tokenizer_config.json", read_tokenizer_config);
  if (!has_json) read_if_there("tokenizer_config.json", read_added_ends);
  read_if_there("generation_config.json", read_config_ids);
  read_if_there("config.json", read_config_ids);
  add_known_end_tokens(data);
  if (std::filesystem::exists(folder / "chat_template.jinja")) {
    data.chat_template = contents(MappedFile(folder / "chat_template.jinja"));
  }
  return data;
}

}  // namespace moba::llm
