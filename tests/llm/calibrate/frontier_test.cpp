#include "llm/calibrate/frontier.h"

#include <gtest/gtest.h>

#include <random>

#include "llm/calibrate/attention_work.h"

namespace moba::llm::test {
namespace {

using Options = std::vector<std::vector<LayerOption>>;

/// Layers of random options, the first of them full attention: the most work, and no divergence.
Options random_options(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](int n) { return static_cast<double>(random() % static_cast<unsigned>(n)); };
  Options options(4);
  for (std::vector<LayerOption>& layer : options) {
    layer.push_back({.work = 100, .divergence = 0});
    for (int i = 0; i < 4; ++i) layer.push_back({.work = 5 + below(90), .divergence = below(50)});
  }
  return options;
}

/// Calls `visit` with work and divergence of every choice.
template <typename Visit>
void each_choice(const Options& options, const Visit& visit, std::size_t layer = 0, double work = 0,
                 double divergence = 0) {
  if (layer == options.size()) return visit(work, divergence);
  for (const LayerOption& option : options[layer])
    each_choice(options, visit, layer + 1, work + option.work, divergence + option.divergence);
}

TEST(Frontier, NoChoiceIsBetterThanOneOfItsPoints) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    const Options options = random_options(seed);
    const std::vector<FrontierPoint> points = frontier(options);
    EXPECT_EQ(points.front().divergence, 0);
    for (std::size_t i = 0; i < points.size(); ++i) {
      const FrontierPoint& point = points[i];
      double work = 0, divergence = 0;
      for (std::size_t layer = 0; layer < options.size(); ++layer) {
        work += options[layer][point.choice[layer]].work;
        divergence += options[layer][point.choice[layer]].divergence;
      }
      EXPECT_DOUBLE_EQ(point.work, work);
      EXPECT_DOUBLE_EQ(point.divergence, divergence);
      EXPECT_TRUE(i == 0 || point.work < points[i - 1].work);
      each_choice(options, [&](double other_work, double other_divergence) {
        EXPECT_FALSE(other_work < work && other_divergence < divergence) << "seed " << seed;
      });
    }
    double least = 1e9;
    each_choice(options, [&](double work, double) { least = std::min(least, work); });
    EXPECT_DOUBLE_EQ(points.back().work, least);
  }
}

TEST(AttentionWork, CountsPairsAndScores) {
  EXPECT_EQ(attention_work(Routing::full(), 10), 55);
  EXPECT_EQ(attention_work({.block_size = 4, .top_k = 3}, 10), 55);  // covers every block
  // 1 to 4 keys of the own block, then 4 more; from the third block on two scores, each half a pair.
  EXPECT_EQ(attention_work({.block_size = 4, .top_k = 2}, 10), 10 + 4 * 4 + 10 + 2 * 4 + 3 + 2);
  const std::vector<Routing> layers{Routing::full(), {.block_size = 4, .top_k = 2}};
  EXPECT_DOUBLE_EQ(speed_up(layers, 10), 110.0 / (55 + 49));
}

}  // namespace
}  // namespace moba::llm::test
