#include "llm/session/stop_text.h"

#include <gtest/gtest.h>

namespace moba::llm {
namespace {

/// Returns the text that comes out for `text` in pieces of `size` bytes.
std::string in_pieces(const std::vector<std::string>& sequences, const std::string& text, std::size_t size) {
  StopText stop(sequences);
  std::string out;
  for (std::size_t i = 0; i < text.size() && !stop.found(); i += size) out += stop.push(text.substr(i, size));
  return out + stop.finish();
}

TEST(StopText, EndsBeforeTheFirstSequenceHoweverTheTextArrives) {
  for (const std::size_t size : {1, 2, 3, 100}) {
    EXPECT_EQ(in_pieces({"END"}, "one ENEND two", size), "one EN");
    EXPECT_EQ(in_pieces({"b", "abc"}, "xxabc", size), "xxa");
    EXPECT_EQ(in_pieces({"c", "bc"}, "xxabc", size), "xxa");
    EXPECT_EQ(in_pieces({"aab"}, "aaaab", size), "aa");
    EXPECT_EQ(in_pieces({"END"}, "no EN", size), "no EN");
    EXPECT_EQ(in_pieces({}, "text", size), "text");
    EXPECT_EQ(in_pieces({""}, "text", size), "text");
  }
}

TEST(StopText, HoldsBackWhatMayBeginASequence) {
  StopText stop({"\n\n", "User:"});
  EXPECT_EQ(stop.push("a\n"), "a");
  EXPECT_EQ(stop.push("Us"), "\n");
  EXPECT_EQ(stop.push("ing"), "Using");
  EXPECT_FALSE(stop.found());
  EXPECT_EQ(stop.push("b\n\nc"), "b");
  EXPECT_TRUE(stop.found());
  EXPECT_EQ(stop.push("d"), "");
  EXPECT_EQ(stop.finish(), "");
}

}  // namespace
}  // namespace moba::llm
