#include "llm/tokenizer/added_tokens.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

namespace moba::llm {
namespace {

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
