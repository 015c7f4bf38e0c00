#include "llm/tokenizer/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace moba::llm {
namespace {

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

}  // namespace
}  // namespace moba::llm
