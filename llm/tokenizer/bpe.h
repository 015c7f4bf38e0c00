#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace moba::llm {

/// Keys are looked up by views of a text.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using TokenIds = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

/// The result of joining two neighbours. Lower ranks come first, then places further left.
struct Merge {
  std::int32_t rank;
  std::int32_t id;
};

/// The merges of a model by the ids of the two neighbours.
class MergeTable {
 public:
  void reserve(std::size_t count) { merges_.reserve(count); }
  /// The later of two merges of one pair counts.
  void set(std::int32_t left, std::int32_t right, Merge merge) { merges_[key(left, right)] = merge; }
  std::optional<Merge> find(std::int32_t left, std::int32_t right) const;

 private:
  struct Mix {
    std::size_t operator()(std::uint64_t x) const;
  };
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
  }

  std::unordered_map<std::uint64_t, Merge, Mix> merges_;
};

/// The tokens of single bytes; -1 where there is none.
using ByteTokens = std::array<std::int32_t, 256>;
constexpr ByteTokens no_byte_tokens() {
  ByteTokens tokens{};
  tokens.fill(-1);
  return tokens;
}

/// Byte-pair encoding with a list of merges, over the bytes of a word or over its characters.
struct Bpe {
  TokenIds vocab;  // by what the tokens stand for: bytes where `byte_level`, else text
  MergeTable merges;
  ByteTokens byte_tokens = no_byte_tokens();  // what characters outside `vocab` fall back to
  bool byte_level = false;
  bool ignore_merges = false;  // a word that is in `vocab` is one token
  std::int32_t unknown = -1;   // the token of what has none; without it that is dropped
  bool fuse_unknown = false;

  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;
};

/// Byte-pair encoding where the score of a piece decides which neighbours join first.
struct SentencePieceBpe {
  struct Piece {
    std::int32_t rank;  // 0 for the best score; equal scores share one
    std::int32_t id;
  };
  std::unordered_map<std::string, Piece, StringHash, std::equal_to<>> pieces;
  std::size_t longest_piece = 0;  // in bytes
  ByteTokens byte_tokens = no_byte_tokens();
  std::int32_t unknown = -1;  // where there are no byte tokens

  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;
};

/// The character that stands for a byte in the files of byte-level models (printable Latin-1 as itself, the
/// rest from U+0100 on).
char32_t byte_character(unsigned char byte);
/// The bytes that a token of a byte-level vocabulary stands for; nothing where it has a character that is no
/// byte's.
std::optional<std::string> bytes_of_characters(std::string_view token);
/// The byte that a token such as <0x0A> stands for; nothing where it is not of that form.
std::optional<unsigned char> byte_of_token(std::string_view token);

}  // namespace moba::llm
