#include "llm/session/text_stream.h"

#include <gtest/gtest.h>

namespace moba::llm {
namespace {

/// Returns the output of a stream for `bytes` given one at a time.
std::string byte_by_byte(std::string_view bytes) {
  TextStream stream;
  std::string text;
  for (char byte : bytes) text += stream.push(std::string_view(&byte, 1));
  return text + stream.finish();
}

std::string at_once(std::string_view bytes) {
  TextStream stream;
  std::string text = stream.push(bytes);
  return text + stream.finish();
}

TEST(TextStream, HoldsBackUnfinishedCharacters) {
  TextStream stream;
  EXPECT_EQ(stream.push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.push("\x98"), "");
  EXPECT_EQ(stream.push("\x80z"), "\xF0\x9F\x98\x80z");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TextStream, FinishReplacesATruncatedCharacter) {
  EXPECT_EQ(at_once("a\xE4\xBD"), "a\xEF\xBF\xBD");
}

TEST(TextStream, ReplacesInvalidBytes) {
  EXPECT_EQ(at_once("a\xFF\x80z"), "a\xEF\xBF\xBD\xEF\xBF\xBDz");
  EXPECT_EQ(at_once("\xC0\xAF"), "\xEF\xBF\xBD\xEF\xBF\xBD");                  // overlong
  EXPECT_EQ(at_once("\xED\xA0\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");  // a surrogate
  EXPECT_EQ(at_once("\xF4\x90\x80\x80").substr(0, 3), "\xEF\xBF\xBD");         // past U+10FFFF
  EXPECT_EQ(at_once("\xE4\xBDz"), "\xEF\xBF\xBDz");
}

TEST(TextStream, OutputDoesNotDependOnHowBytesArrive) {
  for (std::string_view bytes :
       {"plain", "gr\xC3\xBC\xC3\x9F", "\xE4\xBD\xA0\xE5\xA5\xBD", "\xF0\x9F\x98\x80", "\xE4\xBDz",
        "\xFF\xFE\xC3", "\xED\xA0\x80", "\xF0\x80\x80\x80", ""}) {
    EXPECT_EQ(byte_by_byte(bytes), at_once(bytes));
  }
  EXPECT_EQ(byte_by_byte("gr\xC3\xBC\xC3\x9F"), "gr\xC3\xBC\xC3\x9F");
}

}  // namespace
}  // namespace moba::llm
