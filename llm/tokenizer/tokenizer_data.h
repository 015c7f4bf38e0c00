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
  enum class Kind { kNone, kText, kSpecial };  // kNone: an id that no token has
  std::string text;                            // as the file writes it
  std::string bytes;                           // what it stands for
  Kind kind = Kind::kNone;
};

/// Everything a tokenizer is, as plain data: what the readers of the three kinds of file fill in.
struct TokenizerData {
  std::vector<Token> tokens;  // by id
  TokenIds ids;               // by text

  // The way of a text, in order.
  AddedTokens added;
  Normalizer normalizer;
  AddedTokens added_normalized;
  PreTokenizer pre_tokenizer;
  std::variant<Bpe, SentencePieceBpe> model;
  std::vector<std::int32_t> before;  // put around the whole by add_special
  std::vector<std::int32_t> after;

  bool strip_leading_space = false;  // of a decoded text: the one that the normalizer put there
  std::int32_t bos = -1;
  std::vector<std::int32_t> end_tokens;
  std::string chat_template;
};

TokenizerData read_huggingface_folder(const std::filesystem::path& folder);
TokenizerData read_tokenizer_json(const std::filesystem::path& file);
TokenizerData read_tokenizer_model(const std::filesystem::path& file);
TokenizerData read_tokenizer_gguf(const std::filesystem::path& file);

/// The `tokenizer.json` that says what the metadata of a GGUF file with a byte-level tokenizer says. Throws
/// DataError for another kind.
nlohmann::ordered_json tokenizer_json_of_gguf(const std::filesystem::path& file);

/// Puts a token in its place. `where` names the file, for the DataError of an id that is negative, taken or
/// far beyond the `count` tokens that the file holds.
void place_token(TokenizerData& data, std::int64_t id, Token token, std::size_t count,
                 const std::string& where);

/// Adds a token that is found in texts before they are split. It is in `data.tokens` already.
void add_found_token(TokenizerData& data, const AddedToken& token);

/// Adds those of the well-known turn and text ends that the vocabulary holds as special tokens.
void add_known_end_tokens(TokenizerData& data);
void add_end_token(TokenizerData& data, std::int64_t id);

}  // namespace moba::llm
