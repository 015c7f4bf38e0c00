#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llm/tokenizer/utf8.h"

namespace moba::llm {

/// A part of a text, and whether it may spell special tokens.
struct TextPart {
  std::string text;
  bool parse_special = false;
};

/// Converts text to token ids and back: byte-level BPE or SentencePiece BPE, from `tokenizer.json`,
/// `tokenizer.model` or GGUF metadata.
class Tokenizer {
 public:
  /// Opens the tokenizer of a Hugging Face folder or a GGUF file. Throws DataError.
  static Tokenizer open(const std::filesystem::path& model);

  /// Accepts any bytes: one that is not UTF-8 is neither letter, digit nor space for splitting, and is
  /// encoded as itself. A byte or character outside the vocabulary becomes the unknown token, or is dropped
  /// if there is none. `parse_special` encodes special tokens spelled out in the text as such. `add_special`
  /// adds the tokens of the file's post-processor (such as BOS).
  std::vector<std::int32_t> encode(std::string_view text, bool add_special, bool parse_special) const;
  /// Encodes the concatenated parts, without added special tokens. If `begins` is not null, it receives for
  /// each part the number of tokens before it. A token of text on both sides of a beginning comes after it.
  std::vector<std::int32_t> encode(const std::vector<TextPart>& parts,
                                   std::vector<std::size_t>* begins = nullptr) const;
  /// Returns the bytes of one token: "" for an unused id, and for a special token unless `show_special`.
  std::string piece(std::int32_t id, bool show_special = false) const;
  std::string decode(const std::vector<std::int32_t>& ids, bool show_special = false) const;

  std::int64_t vocab_size() const;
  /// Returns the id of the BOS token, or -1.
  std::int32_t bos() const;
  /// Returns every token that ends a turn or a text (EOS, <|im_end|>, <|eot_id|>, ...), from the files' own
  /// metadata (generation_config.json too).
  const std::vector<std::int32_t>& end_tokens() const;
  /// Returns the id of a token by its exact text, or -1.
  std::int32_t id_of(std::string_view token) const;
  /// Returns the Jinja source of the chat template, or "".
  const std::string& chat_template() const;

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

/// Returns the form of chat turns of a template, recognised by the markers in its Jinja source: "ChatML",
/// "Llama 3", "Llama 2", "another", or "none" for no template.
std::string_view chat_form(std::string_view source);

struct Turn {
  std::string role;  // "system", "user", "assistant"
  std::string text;
};

/// Encodes a conversation up to the beginning of the assistant's turn, in the form (ChatML, Llama 3, Llama 2)
/// of the model's template, recognised by its markers, with the template's default system turn. Text inside
/// turns never becomes a special token. Throws UsageError, naming --no-chat, for another template or none.
std::vector<std::int32_t> apply_chat_template(const Tokenizer& tokenizer, const std::vector<Turn>& turns);

/// The place of a turn's text, or of the part of it that the template keeps, in a rendered conversation.
struct TurnText {
  std::size_t turn = 0;
  std::size_t offset = 0;  // of the first byte in the text of the turn
  Span place{};
};

/// A conversation as apply_chat_template() encodes it, with its text.
struct ChatPrompt {
  std::string text;
  std::vector<std::int32_t> ids;
  /// In order; a turn is missing if the template writes another text or none.
  std::vector<TurnText> turns;
};

/// Renders a conversation, with the errors of apply_chat_template().
ChatPrompt chat_prompt(const Tokenizer& tokenizer, const std::vector<Turn>& turns);

/// Tokens [begin, end).
struct TokenRange {
  std::int64_t begin, end;
};

/// A whole conversation as tokens.
struct ChatTokens {
  std::vector<std::int32_t> ids;
  /// Tokens of each assistant turn after its header: the text and the end-of-turn token.
  std::vector<TokenRange> answers;
};

/// Encodes a whole conversation for training, in the form of `apply_chat_template` and with the same errors.
ChatTokens encode_chat(const Tokenizer& tokenizer, const std::vector<Turn>& turns);

}  // namespace moba::llm
