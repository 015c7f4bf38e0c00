#include "llm/eval/needle.h"

#include <gmock/gmock.h>

#include <string>

#include "llm/error.h"
#include "texts.h"

namespace moba::llm::eval {
namespace {

using testing::EndsWith;
using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(Planted, InsertsAtTheBeginningOfALine) {
  const std::string text = "first\nsecond\nthird\n";
  EXPECT_EQ(planted(text, "X", 0), "X\nfirst\nsecond\nthird\n");
  EXPECT_EQ(planted(text, "X", 0.5), "first\nX\nsecond\nthird\n");
  EXPECT_EQ(planted(text, "X", 0.99), "first\nsecond\nX\nthird\n");
  EXPECT_EQ(planted(text, "X", 1), "first\nsecond\nthird\nX\n");
}

TEST(Planted, InsertsBetweenWordsOrCharactersWithoutLines) {
  EXPECT_EQ(planted("", "X", 0.5), "X\n");
  EXPECT_EQ(planted("one two three", "X", 0.5), "one \nX\ntwo three");
  EXPECT_EQ(planted("abcd", "X", 0.5), "ab\nX\ncd");
  EXPECT_EQ(planted("ab\u20ac", "X", 0.9), "ab\nX\n\u20ac");  // not inside a character
}

TEST(Answer, FirstNumberIsExtracted) {
  EXPECT_EQ(first_number(" 1234567."), "1234567");
  EXPECT_EQ(first_number("The number is 12, not 1234567"), "12");
  EXPECT_EQ(first_number("1,234,567"), "1");
  EXPECT_EQ(first_number("none"), "");
  EXPECT_EQ(first_number(""), "");
  EXPECT_FALSE(has_whole_number("It is 123"));
  EXPECT_TRUE(has_whole_number("It is 123."));
  EXPECT_FALSE(has_whole_number("It is"));
}

class NeedleMakerTest : public testing::Test {
 protected:
  NeedleMakerTest() { folder_.write("text.txt", lines_of_text(1000)); }

  Haystack haystack() const { return Haystack::open({folder_.path()}, 0); }
  static NeedleSettings settings() { return {.needle = kNeedle, .question = kBareQuestion}; }
  static std::string text_of(const NeedleCase& made) { return byte_tokenizer().decode(made.prompt); }

  TemporaryFolder folder_;
};

TEST_F(NeedleMakerTest, PlantsOneFactAndAsksForIt) {
  const Haystack text = haystack();
  NeedleMaker maker(text, byte_tokenizer(), settings());
  for (const double depth : {0.0, 0.25, 1.0}) {
    const NeedleCase made = maker.make(4096, depth, 0);
    const std::string prompt = text_of(made),
                      fact = "The magic number of " + made.key + " is " + made.value + ".\n";
    EXPECT_EQ(made.value.size(), 7u);
    EXPECT_EQ(count_of(prompt, fact), 1u);
    EXPECT_EQ(count_of(prompt, made.value), 1u);
    EXPECT_THAT(prompt, EndsWith("\nWhat is the magic number of " + made.key + "?\nThe magic number of " +
                                 made.key + " is"));
    EXPECT_NEAR(static_cast<double>(prompt.find(fact)), depth * 3900, 150);
    EXPECT_LE(made.prompt.size(), 4096u - 32);
    EXPECT_GE(made.prompt.size(), 4096u - 32 - 17);
  }
}

TEST_F(NeedleMakerTest, SeedDeterminesTheCases) {
  const Haystack text = haystack();
  NeedleSettings other = settings();
  other.seed = 1;
  NeedleMaker maker(text, byte_tokenizer(), settings()), again(text, byte_tokenizer(), settings()),
      others(text, byte_tokenizer(), other);
  const NeedleCase made = maker.make(1024, 0.5, 3);
  maker.make(2048, 0.5, 3);
  EXPECT_EQ(made.prompt, again.make(1024, 0.5, 3).prompt);
  EXPECT_EQ(made.prompt, maker.make(1024, 0.5, 3).prompt);
  EXPECT_NE(made.key, maker.make(1024, 0.5, 4).key);
  EXPECT_NE(made.value, maker.make(1024, 1, 3).value);
  EXPECT_NE(made.prompt, others.make(1024, 0.5, 3).prompt);
}

TEST_F(NeedleMakerTest, DepthsShareTheirText) {
  const Haystack text = haystack();
  NeedleMaker maker(text, byte_tokenizer(), settings());
  const std::string middle = text_of(maker.make(4096, 0.5, 0)), end = text_of(maker.make(4096, 1, 0));
  EXPECT_EQ(middle.substr(0, 1900), end.substr(0, 1900));
}

TEST_F(NeedleMakerTest, LengthWithoutRoomThrows) {
  const Haystack text = haystack();
  NeedleMaker maker(text, byte_tokenizer(), settings());
  EXPECT_THAT([&] { maker.make(100, 0, 0); }, ThrowsMessage<UsageError>(HasSubstr("--lengths")));
}

TEST_F(NeedleMakerTest, TooShortTextThrows) {
  const Haystack text = haystack();
  NeedleMaker maker(text, byte_tokenizer(), settings());
  EXPECT_THAT([&] { maker.make(1 << 20, 0, 0); },
              ThrowsMessage<DataError>(testing::AllOf(HasSubstr("--data"), HasSubstr("1048576"))));
}

TEST(Haystack, FilesThatAreNotTextThrow) {
  const TemporaryFolder folder;
  EXPECT_THAT([&] { Haystack::open({folder.write("empty", "")}, 0); },
              ThrowsMessage<DataError>(HasSubstr("empty")));
  EXPECT_THAT([&] { Haystack::open({folder.write("zero", std::string("a\0b", 3))}, 0); },
              ThrowsMessage<DataError>(HasSubstr("zero byte")));
  EXPECT_THAT([&] { Haystack::open({folder.path()}, 0); }, ThrowsMessage<DataError>(HasSubstr("got none")));
  EXPECT_THAT([&] { Haystack::open({folder.path() / "nothing"}, 0); },
              ThrowsMessage<DataError>(HasSubstr("nothing")));
}

TEST(Haystack, ListsDistinctLowercaseWords) {
  const TemporaryFolder folder;
  const auto path =
      folder.write("text", "some words, some_names Words abc 9lives elephantsandmore caf\u00e9s ends");
  EXPECT_THAT(Haystack::open({path}, 0).words(), testing::ElementsAre("ends", "some", "words"));
}

}  // namespace
}  // namespace moba::llm::eval
