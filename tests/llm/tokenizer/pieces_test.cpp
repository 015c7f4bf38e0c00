// The steps of a text before merges: UTF-8, patterns, added tokens, splits, normalisation.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "llm/error.h"
#include "llm/tokenizer/added_tokens.h"
#include "llm/tokenizer/normalizer.h"
#include "llm/tokenizer/pre_tokenizer.h"
#include "llm/tokenizer/utf8.h"

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

TEST(Utf8, IllFormedSequencesHaveSizeZero) {
  EXPECT_EQ(utf8_size("a"), 1u);
  EXPECT_EQ(utf8_size("\xC3\xA9"), 2u);
  EXPECT_EQ(utf8_size("\xE4\xB8\xAD"), 3u);
  EXPECT_EQ(utf8_size("\xF4\x8F\xBF\xBF"), 4u);
  for (const char* bad : {"\x80", "\xC0\x80", "\xC1\xBF", "\xC3", "\xC3(", "\xE0\x80\x80", "\xED\xA0\x80",
                          "\xE4\xB8", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFF"}) {
    EXPECT_EQ(utf8_size(bad), 0u) << testing::PrintToString(std::string(bad));
  }
  EXPECT_EQ(utf8_size(""), 0u);
}

TEST(Utf8, RoundTripsCodePoints) {
  for (const char32_t c :
       {U'\0', U'a', U'\u00E9', U'\u07FF', U'\u0800', U'\uFFFF', U'\U00010000', U'\U0010FFFF'}) {
    std::string text;
    utf8_append(text, c);
    EXPECT_EQ(utf8_size(text), text.size());
    EXPECT_EQ(utf8_decode(text), c);
  }
}

TEST(UnicodeForm, ComposesDecomposesAndOrdersMarks) {
  EXPECT_EQ(to_unicode_form("e\u0301", UnicodeForm::kNfc), "\u00E9");
  EXPECT_EQ(to_unicode_form("\u00E9", UnicodeForm::kNfd), "e\u0301");
  EXPECT_EQ(to_unicode_form("e\u0301\u0323", UnicodeForm::kNfc), "\u1EB9\u0301");
  EXPECT_EQ(to_unicode_form("\u1100\u1161\u11A8", UnicodeForm::kNfc), "\uAC01");
  EXPECT_EQ(to_unicode_form("\uFB01", UnicodeForm::kNfc), "\uFB01");
  EXPECT_EQ(to_unicode_form("\uFB01", UnicodeForm::kNfkc), "fi");
  EXPECT_EQ(to_unicode_form("\u212B", UnicodeForm::kNfkd), "A\u030A");
}

TEST(UnicodeForm, InvalidBytesAreUnchanged) {
  EXPECT_EQ(to_unicode_form("e\xFF\u0301\x80"
                            "e\u0301",
                            UnicodeForm::kNfc),
            "e\xFF\u0301\x80\u00E9");
}

TEST(UnicodeForm, OrdersLongRunsOfMarks) {
  std::string text = "a";
  std::string below;
  std::string above;
  for (int i = 0; i < 200'000; ++i) {
    text += "\u0301\u0323";
    below += "\u0323";
    above += "\u0301";
  }
  EXPECT_EQ(to_unicode_form(text, UnicodeForm::kNfd), "a" + below + above);
}

TEST(Normalizer, AppliesStepsInOrder) {
  const Normalizer steps{Prepend{"_"}, Replace{" ", "_"}, Replace{"__", "="}};
  EXPECT_EQ(normalize(" a b", steps), "=a_b");
  EXPECT_EQ(normalize("", steps), "");
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

struct Found {
  std::string text;
  std::int32_t id;
  bool operator==(const Found&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Found& found) {
  return out << found.text << ":" << found.id;
}

std::vector<Found> find(const AddedTokens& tokens, const std::string& text, bool parse_special = true) {
  std::vector<Found> out;
  for (const Segment& segment : tokens.split(text, [=](Span) { return parse_special; })) {
    out.push_back({std::string(segment.span.of(text)), segment.id});
  }
  return out;
}

TEST(AddedTokens, LeftmostLongestMatchWins) {
  AddedTokens tokens;
  tokens.add("<a>", {.id = 1, .text = {}});
  tokens.add("<a>b", {.id = 2, .text = {}});
  tokens.add("b<a>", {.id = 3, .text = {}});
  EXPECT_EQ(find(tokens, "x<a>b<a>"), (std::vector<Found>{{"x", -1}, {"<a>b", 2}, {"<a>", 1}}));
  EXPECT_EQ(find(tokens, "<a"), (std::vector<Found>{{"<a", -1}}));
  EXPECT_EQ(find(tokens, ""), std::vector<Found>{});
}

TEST(AddedTokens, UnparsedSpecialTokensStayText) {
  AddedTokens tokens;
  tokens.add("<s>", {.id = 1, .text = {}, .special = true});
  tokens.add("<t>", {.id = 2, .text = {}});
  EXPECT_EQ(find(tokens, "<s><t>", false), (std::vector<Found>{{"<s>", -1}, {"<t>", 2}}));
}

TEST(AddedTokens, StripsSpacesAndMatchesSingleWords) {
  AddedTokens tokens;
  tokens.add("<l>", {.id = 1, .text = {}, .left_strip = true});
  tokens.add("<r>", {.id = 2, .text = {}, .right_strip = true});
  tokens.add("on", {.id = 3, .text = {}, .single_word = true});
  EXPECT_EQ(find(tokens, "a \u3000<l> <r>\n b"),
            (std::vector<Found>{{"a", -1}, {" \u3000<l>", 1}, {" ", -1}, {"<r>\n ", 2}, {"b", -1}}));
  EXPECT_EQ(find(tokens, "<r>  <l>"), (std::vector<Found>{{"<r>  ", 2}, {"<l>", 1}}));
  EXPECT_EQ(find(tokens, "one on \u00E9on on"),
            (std::vector<Found>{{"one ", -1}, {"on", 3}, {" \u00E9on ", -1}, {"on", 3}}));
}

}  // namespace
}  // namespace moba::llm
