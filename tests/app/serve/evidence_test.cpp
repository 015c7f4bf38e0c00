#include "app/serve/evidence.h"

#include <gtest/gtest.h>

namespace moba::app {
namespace {

TEST(EndsSentence, AtAMarkBeforeASpace) {
  EXPECT_TRUE(ends_sentence("The sky is blue.", " It"));
  EXPECT_TRUE(ends_sentence("Is the sky blue? ", "It"));
  EXPECT_TRUE(ends_sentence("He said \"the sky is blue!\"", " It"));
  EXPECT_FALSE(ends_sentence("The sky is blue", " It"));
  EXPECT_FALSE(ends_sentence("The number is 3.", "14"));
  EXPECT_FALSE(ends_sentence("The sky is blue.", " "));
  EXPECT_FALSE(ends_sentence("1.", " The"));
  EXPECT_FALSE(ends_sentence("", "The"));
  EXPECT_FALSE(ends_sentence(" ", "The"));
  EXPECT_FALSE(ends_sentence("\"\"\"", " The"));
}

TEST(EndsSentence, AtTheEndOfALineAndAtAFullWidthMark) {
  EXPECT_TRUE(ends_sentence("- blue\n", "- green"));
  EXPECT_TRUE(ends_sentence("- blue", "\n\n- green"));
  EXPECT_FALSE(ends_sentence("- blue", "\n"));
  EXPECT_FALSE(ends_sentence("\n", "- green"));
  EXPECT_TRUE(ends_sentence("天空是蓝色的。", "草"));
  EXPECT_FALSE(ends_sentence("天空是", "蓝色的"));
}

std::shared_ptr<const PromptBlocks> three_blocks() {
  auto prompt = std::make_shared<PromptBlocks>();
  prompt->block_size = 16;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto first = static_cast<std::int64_t>(16 * i);
    prompt->blocks.push_back({{first, first + 16}, {100 * i, 100 * i + 100}, {{1, {50 * i, 50 * i + 50}}}});
  }
  return prompt;
}

TEST(Evidence, AveragesOverTheAnswerAndOverEachSentence) {
  Evidence evidence(three_blocks());
  const float first[] = {0.5F, 0.25F, 0}, second[] = {0.25F, 0, 0.0005F};
  evidence.add(first, "The sky is blue.");
  evidence.add(second, " Grass");
  evidence.add(second, " is green.");
  evidence.finish(32);
  const OrderedJson json = evidence.json();
  EXPECT_EQ(json["block_size"], 16);
  EXPECT_NEAR(json["prompt_weight"].get<double>(), (0.75 + 2 * 0.2505) / 3, 2e-6);
  ASSERT_EQ(json["blocks"].size(), 2U);  // the third has less than a thousandth
  EXPECT_EQ(json["blocks"][0]["weight"], 0.333333);
  EXPECT_EQ(json["blocks"][1]["weight"], 0.083333);
  EXPECT_EQ(json["blocks"][1]["tokens"], OrderedJson({16, 32}));
  EXPECT_EQ(json["blocks"][1]["bytes"], OrderedJson({100, 200}));
  EXPECT_EQ(json["blocks"][1]["messages"], OrderedJson::parse(R"([{"message": 1, "bytes": [50, 100]}])"));
  EXPECT_EQ(json["sentences"], OrderedJson::parse(R"([
    {"tokens": [0, 1], "bytes": [0, 16], "blocks": [0, 1], "weights": [0.5, 0.25]},
    {"tokens": [1, 3], "bytes": [16, 32], "blocks": [0], "weights": [0.25]}])"));
}

TEST(Evidence, TextThatIsNotSentHasNoSentence) {
  Evidence evidence(three_blocks());
  const float weights[] = {0.5F, 0.25F, 0};
  evidence.add(weights, "The sky is blue.");
  evidence.add(weights, " Grass");
  evidence.finish(10);
  ASSERT_EQ(evidence.json()["sentences"].size(), 1U);
  EXPECT_EQ(evidence.json()["sentences"][0]["bytes"], OrderedJson({0, 10}));

  Evidence empty(three_blocks());
  empty.finish(0);
  EXPECT_TRUE(empty.json()["sentences"].empty());
  EXPECT_EQ(empty.json()["prompt_weight"], 0);
}

}  // namespace
}  // namespace moba::app
