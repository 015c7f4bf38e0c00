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

/// A hash for look-ups by views of a text.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using TokenIds = std::unordered_map<std::string, std::int32_t, StringHash, std::equal_to<>>;

/// The result of merging two neighbours. Lower ranks come first, then places further left.
struct Merge {
  std::int32_t rank;
  std::int32_t id;
};

/// The merges of a model, by the ids of the two neighbours.
class MergeTable {
 public:
  void reserve(std::size_t count) { merges_.reserve(count); }
  /// Adds a merge; the later of two for one pair counts.
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

/// The tokens of single bytes; -1 for none.
using ByteTokens = std::array<std::int32_t, 256>;
constexpr ByteTokens no_byte_tokens() {
  ByteTokens tokens{};
  tokens.fill(-1);
  return tokens;
}

/// Byte-pair encoding with a list of merges, over the bytes of a word or over its characters.
struct Bpe {
  /// By the tokens' text; if `byte_level`, by their bytes, and only needed with `ignore_merges`.
  TokenIds vocab;
  MergeTable merges;
  ByteTokens byte_tokens = no_byte_tokens();  // fallback for characters outside `vocab`
  bool byte_level = false;
  bool ignore_merges = false;  // a word that is in `vocab` is one token
  std::int32_t unknown = -1;   // the token of unknown characters; -1 drops them
  bool fuse_unknown = false;

  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;
};

/// Byte-pair encoding that merges neighbours in the order of their pieces' scores.
struct SentencePieceBpe {
  struct Piece {
    std::int32_t rank;  // 0 for the best score; equal scores share one
    std::int32_t id;
  };
  std::unordered_map<std::string, Piece, StringHash, std::equal_to<>> pieces;
  std::size_t longest_piece = 0;  // in bytes
  ByteTokens byte_tokens = no_byte_tokens();
  std::int32_t unknown = -1;  // if there are no byte tokens

  void encode(std::string_view word, std::vector<std::int32_t>& ids) const;
};

/// Returns the character of a byte in the files of byte-level models (printable Latin-1 as itself, the rest
/// from U+0100 on).
char32_t byte_character(unsigned char byte);
/// Returns the bytes of a token of a byte-level vocabulary, or nothing if one of its characters is no byte's.
std::optional<std::string> bytes_of_characters(std::string_view token);
/// Returns the byte of a token such as <0x0A>, or nothing for another form.
std::optional<unsigned char> byte_of_token(std::string_view token);

}  // namespace moba::llm
