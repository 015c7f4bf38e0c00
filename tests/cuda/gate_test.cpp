#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "device_case.h"
#include "on_sm90.h"

/// The gate against the reference's selection. Queries and keys are small integers, so that means and scores
/// are exact in any order of summation and equal scores are frequent.
namespace moba::test {
namespace {

using Score = std::function<double(std::int64_t token)>;

/// Element 0 of a key is score(token); the others are integers below `noise` that the queries of even heads
/// weigh with 1 and those of odd heads with -1.
Case scored_case(const Routing& routing, std::int64_t queries, std::int64_t keys, std::int64_t head_dim,
                 const Score& score, int noise = 0) {
  Case c{.dtype = DType::bf16, .heads_per_kv = 3, .head_dim = head_dim, .routing = routing};
  c.sequences = one_sequence(queries, keys);
  fill(c);
  for (std::int64_t token = 0; token < queries; ++token) {
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      for (std::int64_t d = 0; d < head_dim; ++d)
        c.q.set(token, head, d, d == 0 ? 1 : head % 2 == 0 ? 1 : -1);
    }
  }
  for (std::int64_t token = 0; token < keys; ++token) {
    for (std::int64_t d = 0; d < head_dim; ++d) {
      const auto hash = static_cast<int>((token * 2654435761U + d * 40503U) >> 7 & 0xFFFF);
      c.k.set(token, 0, d, d == 0 ? score(token) : noise == 0 ? 0 : hash % noise);
    }
  }
  return c;
}

std::vector<std::int32_t> selection_of(const Case& c, bool is_on_device) {
  Result result(c);
  if (is_on_device) return run_on_device(c).selection;
  select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, result.outputs().selection,
                {.backend = "reference"});
  return result.selection;
}

void expect_reference(const Case& c, const std::string& what) {
  EXPECT_EQ(selection_of(c, true), selection_of(c, false)) << what;
}

const std::vector<std::pair<std::string, Score>>& scores() {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static const std::vector<std::pair<std::string, Score>> all{
      {"rising", [](std::int64_t token) { return std::floor(static_cast<double>(token) / 8); }},
      {"falling", [](std::int64_t token) { return -std::floor(static_cast<double>(token) / 8); }},
      {"equal", [](std::int64_t) { return 1.0; }},
      {"lowest", [=](std::int64_t) { return -kInfinity; }},
      {"periodic", [](std::int64_t token) { return static_cast<double>(token % 37 - 18); }},
      {"NaN and infinity",
       [=](std::int64_t token) {
         if (token % 11 == 3) return std::numeric_limits<double>::quiet_NaN();
         return token % 97 == 5 ? kInfinity : token % 7 == 1 ? -kInfinity : static_cast<double>(token % 5);
       }},
  };
  return all;
}

class CudaGate : public OnSm90, public testing::WithParamInterface<const char*> {
 protected:
  CudaGate() {
    if (GetParam() == std::string("sm80")) choose("sm80");
  }
  void SetUp() override {
    if (GetParam() == std::string("sm90")) OnSm90::SetUp();
  }
};

TEST_P(CudaGate, AnyOrderOfScoresSelectsAsTheReference) {
  for (const auto& [name, score] : scores()) {
    expect_reference(scored_case({.block_size = 2, .top_k = 8}, 70, 600, 64, score), name);
    expect_reference(scored_case({.block_size = 2, .top_k = 6, .sink_blocks = 3}, 70, 600, 128, score), name);
    expect_reference(scored_case({.block_size = 3, .top_k = 5, .causal = false}, 70, 400, 96, score), name);
    expect_reference(
        scored_case({.block_size = 3, .top_k = 5, .sink_blocks = 2, .causal = false, .own_block = true}, 400,
                    400, 64, score),
        name);
    expect_reference(scored_case({.block_size = 2, .top_k = 4}, 40, 300, 256, score), name);
  }
}

TEST_P(CudaGate, ManyBlocksSelectAsTheReference) {
  const Score zero = [](std::int64_t) { return 0.0; };
  for (const std::int64_t top_k : {2, 3, 8, 17, 40, 100}) {
    expect_reference(scored_case({.block_size = 1, .top_k = top_k}, 50, 1500, 64, zero, 7),
                     "top_k " + std::to_string(top_k));
  }
}

/// Queries before the first key, few candidates, and sinks beyond them.
TEST_P(CudaGate, RowsWithFewCandidatesSelectThemAll) {
  const Score periodic = [](std::int64_t token) { return static_cast<double>(token % 5); };
  for (const std::int64_t sinks : {0, 2, 5}) {
    expect_reference(
        scored_case({.block_size = 4, .top_k = 6, .sink_blocks = sinks}, 60, 60, 64, periodic, 3),
        std::to_string(sinks) + " sinks");
    expect_reference(
        scored_case({.block_size = 4, .top_k = 6, .sink_blocks = sinks}, 80, 60, 64, periodic, 3),
        std::to_string(sinks) + " sinks, queries before the first key");
  }
  Case batch = scored_case({.block_size = 4, .top_k = 3, .sink_blocks = 1}, 90, 150, 64, periodic, 4);
  batch.sequences = {{0, 7, 7, 90}, {0, 40, 41, 150}};
  expect_reference(batch, "several sequences");
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaGate, testing::Values("sm80", "sm90"),
                         [](const auto& kernels) { return std::string(kernels.param); });

}  // namespace
}  // namespace moba::test
