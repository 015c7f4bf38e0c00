#include "llm/tokenizer/token_offsets.h"

#include <gtest/gtest.h>

namespace moba::llm {
namespace {

using Offsets = std::vector<std::size_t>;

Offsets offsets(std::string_view text, const std::vector<std::string>& pieces) {
  return piece_offsets(text, pieces);
}

TEST(PieceOffsets, PiecesOfTheTextFollowEachOther) {
  EXPECT_EQ(offsets("Hello world", {"Hel", "lo", " world"}), Offsets({0, 3, 5, 11}));
  EXPECT_EQ(offsets("", {}), Offsets({0}));
  EXPECT_EQ(offsets("\xC3\xA9x", {"\xC3", "\xA9", "x"}), Offsets({0, 1, 2, 3}));
}

TEST(PieceOffsets, SpaceThatTheTokenizerAddedHasNoByte) {
  EXPECT_EQ(offsets("Hello world", {" Hello", " world"}), Offsets({0, 5, 11}));
  EXPECT_EQ(offsets("<s>Hi</s>Hi", {"<s>", " Hi", "</s>", " Hi"}), Offsets({0, 3, 5, 9, 11}));
}

TEST(PieceOffsets, TokensThatTheTextLacksAreEmpty) {
  EXPECT_EQ(offsets("Hello", {"<|begin_of_text|>", "Hello"}), Offsets({0, 0, 5}));
  EXPECT_EQ(offsets("Hello", {"<s>", "Hello", "</s>"}), Offsets({0, 0, 5, 5}));
}

TEST(PieceOffsets, AnotherUnicodeFormKeepsTheTextAround) {
  // e and a combining accent, which the tokenizer has composed; then its bytes in two tokens.
  EXPECT_EQ(offsets("caf\x65\xCC\x81 noir", {"caf", "\xC3\xA9", " noir"}), Offsets({0, 3, 6, 11}));
  EXPECT_EQ(offsets("caf\x65\xCC\x81 noir", {"caf", "\xC3", "\xA9", " noir"}), Offsets({0, 3, 6, 6, 11}));
}

TEST(PieceOffsets, CharactersWithoutATokenBelongToTheTokenBefore) {
  EXPECT_EQ(offsets("one \xF0\x9F\xA6\x99 two", {"one", " ", " two"}), Offsets({0, 3, 8, 12}));
  EXPECT_EQ(offsets("one \xF0\x9F\xA6\x99 two", {"one", " ", "<unk>", " two"}), Offsets({0, 3, 4, 8, 12}));
}

TEST(PieceOffsets, UnrelatedPiecesEnd) {
  const std::vector<std::string> pieces(1000, "x");
  const Offsets found = offsets(std::string(1000, 'y'), pieces);
  EXPECT_EQ(found.size(), 1001U);
  EXPECT_EQ(found.back(), 1000U);
}

}  // namespace
}  // namespace moba::llm
