#include "llm/tokenizer/pre_tokenizer.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "llm/error.h"

namespace moba::llm {
namespace {

using Texts = std::vector<std::string>;

Texts pieces_of(const std::string& text, const PreTokenizer& steps, bool at_start = true) {
  const Pieces pieces = pre_tokenize(text, at_start, steps);
  Texts out;
  for (const Span& span : pieces.spans) out.emplace_back(span.of(pieces.text));
  return out;
}

PreTokenizer split(const char* regex, SplitBehavior behavior, bool invert = false) {
  return {Split{Pattern::regex(regex, "test"), behavior, invert}};
}

TEST(Split, FollowsEverySplitBehavior) {
  EXPECT_EQ(pieces_of("a--b-", split("-", SplitBehavior::kIsolated)), (Texts{"a", "-", "-", "b", "-"}));
  EXPECT_EQ(pieces_of("a--b-", split("-", SplitBehavior::kRemoved)), (Texts{"a", "b"}));
  EXPECT_EQ(pieces_of("a--b-", split("-", SplitBehavior::kContiguous)), (Texts{"a", "--", "b", "-"}));
  EXPECT_EQ(pieces_of("-a--b-", split("-", SplitBehavior::kMergedWithPrevious)),
            (Texts{"-", "a-", "-", "b-"}));
  EXPECT_EQ(pieces_of("-a--b-", split("-", SplitBehavior::kMergedWithNext)), (Texts{"-a", "-", "-b", "-"}));
  EXPECT_EQ(pieces_of("a--b-", split("-", SplitBehavior::kRemoved, true)), (Texts{"-", "-", "-"}));
}

TEST(Split, EmptyMatchesSplit) {
  EXPECT_EQ(pieces_of("ab\u00E9", split("(?=b)|x*", SplitBehavior::kIsolated)), (Texts{"a", "b", "\u00E9"}));
}

TEST(Split, MatchesDoNotSeeOtherPieces) {
  PreTokenizer steps = split("x", SplitBehavior::kRemoved);
  steps.emplace_back(Split{Pattern::regex(kGpt2Pattern, "test")});
  EXPECT_EQ(pieces_of("a  x b", steps), (Texts{"a", "  ", " b"}));
}

TEST(Split, InvalidBytesMatchAsSymbols) {
  const PreTokenizer steps = split(kGpt2Pattern, SplitBehavior::kIsolated);
  EXPECT_EQ(pieces_of("ab\xFF\x80 \xC3 c", steps), (Texts{"ab", "\xFF\x80", " \xC3", " c"}));
}

TEST(Split, LongRunsOfSpacesMatch) {
  const std::string spaces(300'000, ' ');
  const char* newline_or_spaces = R"(\s*[\r\n]+|\s+(?!\S)|\s+|x)";
  EXPECT_EQ(pieces_of(spaces + "x", split(newline_or_spaces, SplitBehavior::kIsolated)).size(), 3u);
  EXPECT_EQ(pieces_of(spaces + "x", split(kGpt2Pattern, SplitBehavior::kIsolated)).size(), 2u);
  EXPECT_EQ(pieces_of(spaces, split(R"((?:\s|x)+?y|(?:(\s)|x)+)", SplitBehavior::kIsolated)).size(), 1u);
}

TEST(Split, ExponentialAndInvalidPatternsThrow) {
  EXPECT_THROW(pieces_of(std::string(64, 'a') + "b", split("(a+)+$|(?:a|a)*c", SplitBehavior::kIsolated)),
               DataError);
  EXPECT_THROW(Pattern::regex("(", "test"), DataError);
  EXPECT_THROW(Pattern::regex(std::string(100'000, '('), "test"), DataError);
}

TEST(AddPrefixSpace, AppliesToPiecesWithoutOne) {
  EXPECT_EQ(pieces_of("a", {AddPrefixSpace{}}), Texts{" a"});
  EXPECT_EQ(pieces_of("\u3000a", {AddPrefixSpace{}}), Texts{"\u3000a"});
  EXPECT_EQ(pieces_of("", {AddPrefixSpace{}}), Texts{});
}

TEST(Metaspace, PrependsAccordingToTheScheme) {
  const auto with = [](Metaspace::Prepend prepend) { return PreTokenizer{Metaspace{"_", prepend}}; };
  EXPECT_EQ(pieces_of("a b", with(Metaspace::Prepend::kAlways), false), Texts{"_a_b"});
  EXPECT_EQ(pieces_of(" a", with(Metaspace::Prepend::kAlways)), Texts{"_a"});
  EXPECT_EQ(pieces_of("a b", with(Metaspace::Prepend::kFirst), true), Texts{"_a_b"});
  EXPECT_EQ(pieces_of("a b", with(Metaspace::Prepend::kFirst), false), Texts{"a_b"});
  EXPECT_EQ(pieces_of("a b", with(Metaspace::Prepend::kNever)), Texts{"a_b"});
}

}  // namespace
}  // namespace moba::llm
