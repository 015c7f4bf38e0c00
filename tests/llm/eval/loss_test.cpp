#include "llm/eval/loss.h"

#include <gmock/gmock.h>

#include <cmath>

#include "llm/error.h"
#include "texts.h"

namespace moba::llm::eval {
namespace {

using testing::ElementsAre;
using testing::SizeIs;

TEST(LossOf, IsTheNegativeLogProbability) {
  const std::vector<float> logits{1, 2, 3};
  const double sum = std::exp(1.0) + std::exp(2.0) + std::exp(3.0);
  EXPECT_NEAR(loss_of(logits, 0), std::log(sum) - 1, 1e-6);
  EXPECT_NEAR(loss_of(logits, 2), std::log(sum) - 3, 1e-6);
}

TEST(LossOf, HandlesLargeAndInfiniteLogits) {
  EXPECT_NEAR(loss_of(std::vector<float>{1e4F, 1e4F}, 0), std::log(2.0), 1e-3);
  EXPECT_EQ(loss_of(std::vector<float>{0, -INFINITY}, 0), 0);
  EXPECT_EQ(loss_of(std::vector<float>{0, -INFINITY}, 1), INFINITY);
  EXPECT_TRUE(std::isnan(loss_of(std::vector<float>{0, NAN}, 0)));
}

TokenScores scores_of(std::vector<double> losses) {
  TokenScores scores;
  scores.losses = std::move(losses);
  return scores;
}

TEST(Losses, AreSplitByPositionAndTail) {
  const Positions positions{.seq_len = 8, .trailing = 2, .buckets = 4};
  Losses losses;
  add(losses, positions, scores_of({1, 2, 3, 4, 5, 6, 7}));  // positions 1 to 7
  add(losses, positions, scores_of({10, 20}));               // too short for a tail
  EXPECT_DOUBLE_EQ(mean(losses.all), 58.0 / 9);
  ASSERT_THAT(losses.trailing, SizeIs(1));
  EXPECT_DOUBLE_EQ(mean(losses.trailing), 6.5);
  EXPECT_DOUBLE_EQ(mean(losses.positions[0]), (1 + 10) / 2.0);
  EXPECT_DOUBLE_EQ(mean(losses.positions[1]), (2 + 3 + 20) / 3.0);
  EXPECT_DOUBLE_EQ(mean(losses.positions[3]), 6.5);
}

TEST(Losses, BucketsCoverEveryPosition) {
  for (const std::int64_t buckets : {1, 3, 7, 10}) {
    const Positions positions{.seq_len = 10, .trailing = 1, .buckets = buckets};
    EXPECT_EQ(positions.begin_of(0), 0);
    EXPECT_EQ(positions.begin_of(buckets), 10);
    for (std::int64_t p = 0; p < 10; ++p) {
      EXPECT_LE(positions.begin_of(positions.bucket_of(p)), p);
      EXPECT_GT(positions.begin_of(positions.bucket_of(p) + 1), p);
    }
  }
}

class SequencesTest : public testing::Test {
 protected:
  std::vector<std::size_t> sizes(const SequenceSettings& settings) const {
    std::vector<std::size_t> result;
    for (const auto& sequence : sequences_of({folder_.path()}, byte_tokenizer(), settings))
      result.push_back(sequence.size());
    std::sort(result.begin(), result.end());
    return result;
  }

  TemporaryFolder folder_;
};

TEST_F(SequencesTest, DocumentsAreCutToSeqLen) {
  folder_.write("a.txt", std::string(10, 'a'));
  folder_.write("b.txt", std::string(4, 'b'));
  folder_.write("c/c.txt", "c");  // one token predicts nothing
  folder_.write("d.bin", std::string("\0\0", 2));
  EXPECT_THAT(sizes({.seq_len = 4}), ElementsAre(2, 4, 4, 4));
  EXPECT_THAT(sizes({.seq_len = 100}), ElementsAre(4, 10));
  EXPECT_THAT(sizes({.seq_len = 4, .join = true}), ElementsAre(3, 4, 4, 4));
  EXPECT_THAT(sizes({.seq_len = 4, .join = true, .max_tokens = 8}), ElementsAre(4, 4));
}

TEST_F(SequencesTest, ASingleTokenThrows) {
  folder_.write("a.txt", "a");
  EXPECT_THROW(sizes({}), DataError);
}

}  // namespace
}  // namespace moba::llm::eval
