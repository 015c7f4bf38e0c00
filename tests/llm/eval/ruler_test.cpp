#include "llm/eval/ruler.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "llm/error.h"
#include "texts.h"

namespace moba::llm::eval {
namespace {

using testing::HasSubstr;

TEST(RulerScore, IsTheShareOfExpectedTextsFound) {
  EXPECT_EQ(ruler_score("They are 12 and 34.", {"12", "34"}), 1);
  EXPECT_EQ(ruler_score("They are 12 and 35.", {"12", "34"}), 0.5);
  EXPECT_EQ(ruler_score("abcde FGHIJ", {"ABCDE", "fghij", "KLMNO", "pqrst"}), 0.5);
  EXPECT_EQ(ruler_score("", {"12"}), 0);
  EXPECT_EQ(ruler_score("1 2", {"12"}), 0);
  EXPECT_EQ(ruler_score("112", {"12"}), 1);  // a part of something longer counts, as in RULER
}

class RulerMakerTest : public testing::Test {
 protected:
  RulerMakerTest()
      : haystack_(Haystack::open({folder_.write("text.txt", lines_of_text(1500))}, 0)),
        maker_(haystack_, byte_tokenizer(), /*chat=*/false, /*seed=*/3) {}

  std::string prompt(const RulerCase& made) const { return byte_tokenizer().decode(made.prompt); }

  TemporaryFolder folder_;
  Haystack haystack_;
  RulerMaker maker_;
};

TEST_F(RulerMakerTest, EveryTaskFillsItsLength) {
  for (const std::string& task : ruler_tasks()) {
    const RulerCase made = maker_.make(task, 16384, 0);
    const std::size_t max_tokens = 16384 - static_cast<std::size_t>(ruler_answer_tokens(task));
    EXPECT_LE(made.prompt.size(), max_tokens) << task;
    EXPECT_GE(made.prompt.size(), max_tokens * 95 / 100) << task;
    EXPECT_FALSE(made.expected.empty()) << task;
    EXPECT_EQ(made.prompt, maker_.make(task, 16384, 0).prompt) << task;
    EXPECT_NE(made.prompt, maker_.make(task, 16384, 1).prompt) << task;
  }
}

TEST_F(RulerMakerTest, EachNeedleOccursOnce) {
  const std::map<std::string, std::size_t> needles{{"niah_single_1", 1},   {"niah_single_2", 1},
                                                   {"niah_single_3", 1},   {"niah_multikey_1", 4},
                                                   {"niah_multivalue", 4}, {"niah_multiquery", 4}};
  for (const auto& [task, count] : needles) {
    const RulerCase made = maker_.make(task, 8192, 0);
    const std::string text = prompt(made);
    EXPECT_EQ(count_of(text, "One of the special magic"), count) << task;
    EXPECT_EQ(made.expected.size(), task == "niah_multivalue" || task == "niah_multiquery" ? 4u : 1u) << task;
    for (const std::string& value : made.expected) EXPECT_EQ(count_of(text, value), 1u) << task;
  }
}

TEST_F(RulerMakerTest, QueryNamesTheKeyOfTheAnswer) {
  for (const std::string task :
       {"niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery"}) {
    const RulerCase made = maker_.make(task, 8192, 1);
    const std::string text = prompt(made);
    for (const std::string& value : made.expected) {
      const std::size_t end = text.find(" is: " + value), begin = text.rfind(" for ", end) + 5;
      const std::string key = text.substr(begin, end - begin);
      EXPECT_GT(text.rfind(key), text.rfind("What ")) << task;
    }
  }
}

TEST_F(RulerMakerTest, VariablesFormAChain) {
  const RulerCase made = maker_.make("vt", 8192, 0);
  const std::string text = prompt(made);
  ASSERT_EQ(made.expected.size(), 5u);
  std::size_t at = text.find("VAR " + made.expected[0] + " = ");
  for (std::size_t i = 1; i < 5; ++i) {
    const std::size_t next = text.find("VAR " + made.expected[i] + " = VAR " + made.expected[i - 1] + " ");
    EXPECT_GT(next, at);
    ASSERT_NE(next, std::string::npos);
    at = next;
  }
}

TEST_F(RulerMakerTest, CommonWordsOccurTenTimesAsOften) {
  const RulerCase made = maker_.make("cwe", 16384, 0);
  const std::string text = prompt(made);
  std::istringstream list(text.substr(text.rfind("Memorize")));
  std::map<std::string, int> counts;
  for (std::string number, word; list >> number;) {
    if (std::isdigit(static_cast<unsigned char>(number[0])) == 0 || !number.ends_with('.')) continue;
    list >> word;
    ++counts[word];
  }
  EXPECT_EQ(made.expected.size(), 10u);
  EXPECT_GT(counts.size(), 30u);
  for (const auto& [word, count] : counts) {
    const bool is_common = std::find(made.expected.begin(), made.expected.end(), word) != made.expected.end();
    EXPECT_EQ(count, is_common ? 30 : 3) << word;
  }
}

TEST_F(RulerMakerTest, ExpectedWordsAreTheMostFrequent) {
  const RulerCase made = maker_.make("fwe", 8192, 0);
  const std::string text = prompt(made);
  const std::size_t begin = text.find("coded words. ") + 13;
  std::istringstream list(text.substr(begin, text.find("\nQuestion") - begin));
  std::map<std::string, int> counts;
  for (std::string word; list >> word;) ++counts[word];
  EXPECT_GT(counts["..."], counts[made.expected[0]]);
  counts.erase("...");
  for (std::size_t i = 0; i < 3; ++i) {
    const auto most = std::max_element(counts.begin(), counts.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
    EXPECT_EQ(most->second, counts[made.expected[i]]);
    counts.erase(made.expected[i]);
  }
}

TEST_F(RulerMakerTest, ImpossiblePromptsThrow) {
  EXPECT_THAT(
      [&] { maker_.make("niah_single_1", 256, 0); },
      testing::ThrowsMessage<UsageError>(testing::AllOf(HasSubstr("--lengths"), HasSubstr("niah_single_1"))));
  EXPECT_THAT([&] { maker_.make("qa_1", 8192, 0); },
              testing::ThrowsMessage<UsageError>(testing::AllOf(HasSubstr("--tasks"), HasSubstr("qa_1"))));
}

}  // namespace
}  // namespace moba::llm::eval
