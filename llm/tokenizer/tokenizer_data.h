#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "llm/tokenizer/added_tokens.h"
#include "llm/tokenizer/bpe.h"
#include "llm/tokenizer/normalizer.h"
#include "llm/tokenizer/pre_tokenizer.h"

namespace moba::llm {

/// One entry of a vocabulary.
struct Token {
  enum class Kind { kNone, kText, kSpecial };  // kNone: an unused id
  std::string text;                            // as the file writes it
  std::string bytes;                           // the bytes it decodes to
  Kind kind = Kind::kNone;
};

/// A tokenizer as plain data, filled in by the readers of the three file formats.
struct TokenizerData {
  std::vector<Token> tokens;  // by id
  TokenIds ids;               // by text

  // The stages of encoding, in order.
  AddedTokens added;
  Normalizer normalizer;
  AddedTokens added_normalized;
  PreTokenizer pre_tokenizer;
  std::variant<Bpe, SentencePieceBpe> model;
  std::vector<std::int32_t> before;  // added around the text by add_special
  std::vector<std::int32_t> after;

  bool strip_leading_space = false;  // of a decoded text: the one that the normalizer added
  std::int32_t bos = -1;
  std::vector<std::int32_t> end_tokens;
  std::string chat_template;
};

TokenizerData read_huggingface_folder(const std::filesystem::path& folder);
TokenizerData read_tokenizer_json(const std::filesystem::path& file);
TokenizerData read_tokenizer_model(const std::filesystem::path& file);
TokenizerData read_tokenizer_gguf(const std::filesystem::path& file);

/// Converts the metadata of a GGUF file with a byte-level tokenizer to a `tokenizer.json`. Throws DataError
/// for another kind.
nlohmann::ordered_json tokenizer_json_of_gguf(const std::filesystem::path& file);

/// Adds a token. `where` names the file, for the DataError of an id that is negative, taken or far beyond the
/// `count` tokens of the file.
void place_token(TokenizerData& data, std::int64_t id, Token token, std::size_t count,
                 const std::string& where);

/// Adds a token of `data.tokens` that is matched in texts before they are split.
void add_found_token(TokenizerData& data, const AddedToken& token);

/// Adds the well-known end-of-turn and end-of-text tokens that the vocabulary has as special tokens.
void add_known_end_tokens(TokenizerData& data);
void add_end_token(TokenizerData& data, std::int64_t id);

}  // namespace moba::llm
