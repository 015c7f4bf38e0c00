#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moba::llm {

/// A stretch of a text, and whether it may spell special tokens.
struct TextPart {
  std::string text;
  bool parse_special = false;
};

/// Text to token ids and back: byte-level BPE or SentencePiece BPE, from `tokenizer.json`, `tokenizer.model`
/// or GGUF metadata.
class Tokenizer {
 public:
  /// From a Hugging Face folder or a GGUF file. Throws DataError.
  static Tokenizer open(const std::filesystem::path& model);

  /// Bytes of any kind are accepted: one that is not UTF-8 is neither letter, digit nor space where a text is
  /// split, and itself among the tokens. A byte or character that the vocabulary has no token for gives the
  /// unknown token, or nothing where there is none. Special tokens that the text spells out become themselves
  /// where `parse_special`. `add_special` adds what the file's post-processor adds (a BOS token, say).
  std::vector<std::int32_t> encode(std::string_view text, bool add_special, bool parse_special) const;
  /// As encode() of the parts put together, nothing added.
  std::vector<std::int32_t> encode(const std::vector<TextPart>& parts) const;
  /// The bytes of one token; special tokens give their text when `show_special`, else nothing.
  /// Ids that name no token give nothing.
  std::string piece(std::int32_t id, bool show_special = false) const;
  std::string decode(const std::vector<std::int32_t>& ids, bool show_special = false) const;

  std::int64_t vocab_size() const;
  /// -1 where there is none.
  std::int32_t bos() const;
  /// Every token that ends a turn or a text (EOS, <|im_end|>, <|eot_id|>, ...), from the files' own metadata
  /// (generation_config.json too).
  const std::vector<std::int32_t>& end_tokens() const;
  /// Id of a token by its exact text, or -1.
  std::int32_t id_of(std::string_view token) const;
  /// The Jinja source of the chat template; empty where the files hold none.
  const std::string& chat_template() const;

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

/// The form of chat turns that a template's Jinja source writes, recognised by its markers: "ChatML", "Llama
/// 3", "Llama 2", "another", or "none" for no template.
std::string_view chat_form(std::string_view source);

struct Turn {
  std::string role;  // "system", "user", "assistant"
  std::string text;
};

/// The tokens of a conversation up to where the assistant is to speak, in the form (ChatML, Llama 3, Llama 2)
/// that the model's template uses, recognised by its markers; the default system turn of the template
/// included. Text inside turns never becomes a special token. Throws UsageError, naming
/// --no-chat, for a template that is none of these, or no template.
std::vector<std::int32_t> apply_chat_template(const Tokenizer& tokenizer, const std::vector<Turn>& turns);

}  // namespace moba::llm
