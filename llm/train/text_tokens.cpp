#include "llm/train/text_tokens.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "llm/error.h"
#include "llm/formats/fingerprint.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/output_file.h"
#include "llm/tokenizer/bpe.h"
#include "llm/tokenizer/tokenizer.h"
#include "llm/tokenizer/tokenizer_data.h"
#include "llm/tokenizer/utf8.h"

namespace moba::llm::train {
namespace {

constexpr std::int32_t kBytes = 256;
constexpr const char* kEndOfText = "<|endoftext|>";

/// Files that `transformers` expects beside the weights.
constexpr const char* kTokenizerFiles[] = {
    "tokenizer.json",    "tokenizer.model",     "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json"};

/// Returns a byte-level BPE without merges.
nlohmann::ordered_json byte_tokenizer_json() {
  nlohmann::ordered_json vocab = nlohmann::ordered_json::object();
  for (int byte = 0; byte < kBytes; ++byte) {
    std::string character;
    utf8_append(character, byte_character(static_cast<unsigned char>(byte)));
    vocab[character] = byte;
  }
  const nlohmann::ordered_json byte_level{
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens",
           {{{"id", kBytes},
             {"content", kEndOfText},
             {"single_word", false},
             {"lstrip", false},
             {"rstrip", false},
             {"normalized", false},
             {"special", true}}}},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", nlohmann::ordered_json::array()}}}};
}

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

struct TextTokens::Impl {
  std::optional<Tokenizer> tokenizer;  // without one, bytes
  std::filesystem::path origin;        // its folder or GGUF file
  nlohmann::ordered_json from_gguf;    // the tokenizer.json of a GGUF file
  std::string identity;
};

namespace {

nlohmann::ordered_json config_of(const Tokenizer& tokenizer) {
  nlohmann::ordered_json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
                                {"clean_up_tokenization_spaces", false}};
  if (tokenizer.bos() >= 0) config["bos_token"] = tokenizer.piece(tokenizer.bos(), true);
  if (!tokenizer.end_tokens().empty())
    config["eos_token"] = tokenizer.piece(tokenizer.end_tokens().front(), true);
  if (!tokenizer.chat_template().empty()) config["chat_template"] = tokenizer.chat_template();
  return config;
}

}  // namespace

TextTokens TextTokens::bytes() {
  TextTokens tokens;
  tokens.impl_ = std::make_shared<const Impl>(Impl{{}, {}, {}, "bytes"});
  return tokens;
}

TextTokens TextTokens::open(const std::filesystem::path& model) {
  Impl impl{Tokenizer::open(model), model, {}, {}};
  Fingerprint fingerprint;
  if (std::filesystem::is_directory(model)) {
    for (const char* name : kTokenizerFiles) {
      if (std::filesystem::exists(model / name)) fingerprint.add(text_of(MappedFile(model / name)));
    }
  } else {
    impl.from_gguf = tokenizer_json_of_gguf(model);
    fingerprint.add(impl.from_gguf.dump());
  }
  impl.identity = fingerprint.text();
  TextTokens tokens;
  tokens.impl_ = std::make_shared<const Impl>(std::move(impl));
  return tokens;
}

std::vector<std::int32_t> TextTokens::encode(std::string_view text, bool beginning) const {
  if (impl_->tokenizer) return impl_->tokenizer->encode(text, beginning, /*parse_special=*/false);
  std::vector<std::int32_t> ids(text.size());
  std::transform(text.begin(), text.end(), ids.begin(), [](char c) { return static_cast<unsigned char>(c); });
  return ids;
}

ChatTokens TextTokens::encode_chat(const std::vector<Turn>& turns) const {
  const std::string_view form = impl_->tokenizer ? chat_form(impl_->tokenizer->chat_template()) : "none";
  if (form == "none" || form == "another") {
    throw UsageError(fmt::format(
        "chat: expected a tokenizer with a chat template (ChatML, Llama 3 or Llama 2), got {}; name an "
        "instruct model, or a folder with a tokenizer and such a chat_template.jinja, as --tokenizer",
        !impl_->tokenizer   ? "bytes"
        : form == "another" ? "another template"
                            : "none"));
  }
  return llm::encode_chat(*impl_->tokenizer, turns);
}

std::int32_t TextTokens::end() const {
  if (!impl_->tokenizer) return kBytes;
  const auto& ends = impl_->tokenizer->end_tokens();
  return ends.empty() ? -1 : ends.front();
}

std::int64_t TextTokens::vocab_size() const {
  return impl_->tokenizer ? impl_->tokenizer->vocab_size() : kBytes + 1;
}

const std::string& TextTokens::identity() const {
  return impl_->identity;
}

void TextTokens::save(const std::filesystem::path& folder) const {
  if (!impl_->tokenizer) {
    const nlohmann::ordered_json config{{"tokenizer_class", "PreTrainedTokenizerFast"},
                                        {"eos_token", kEndOfText},
                                        {"clean_up_tokenization_spaces", false}};
    write_file(folder / "tokenizer.json", byte_tokenizer_json().dump() + "\n");
    write_file(folder / "tokenizer_config.json", config.dump(2) + "\n");
    return;
  }
  if (!impl_->from_gguf.is_null()) {
    write_file(folder / "tokenizer.json", impl_->from_gguf.dump() + "\n");
    write_file(folder / "tokenizer_config.json", config_of(*impl_->tokenizer).dump(2) + "\n");
    return;
  }
  for (const char* name : kTokenizerFiles) {
    const auto from = impl_->origin / name;
    if (std::filesystem::exists(from)) write_file(folder / name, text_of(MappedFile(from)));
  }
}

}  // namespace moba::llm::train
