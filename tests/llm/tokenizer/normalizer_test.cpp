#include "llm/tokenizer/normalizer.h"

#include <gtest/gtest.h>

#include <string>

namespace moba::llm {
namespace {

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

}  // namespace
}  // namespace moba::llm
