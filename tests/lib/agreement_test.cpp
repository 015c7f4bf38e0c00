// Every backend against the oracle over thousands of generated cases, and fast backends against the
// reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "backends.h"
#include "oracle.h"

namespace moba::test {
namespace {

constexpr std::uint64_t kShards = 8;

/// Cases per shard; `make test-long` sets MOBA_TEST_CASES.
const std::uint64_t kCasesOfAShard = [] {
  const char* wanted = std::getenv("MOBA_TEST_CASES");
  return wanted == nullptr ? std::uint64_t{300} : std::strtoull(wanted, nullptr, 10);
}();

class Agreement : public testing::TestWithParam<std::tuple<std::string, std::uint64_t>> {};
using FastAgreement = Agreement;

TEST_P(Agreement, MatchesTheOracleOnRandomCases) {
  const auto& [backend, shard] = GetParam();
  std::int64_t swaps = 0, listed = 0;
  for (std::uint64_t i = 0; i < kCasesOfAShard && !HasFailure(); ++i) {
    const Case c = random_case(shard * kCasesOfAShard + i);
    try {
      const Result result = run_attention(c, {.backend = backend, .parallel = serial()});
      swaps += check_result(c, result, backend == "reference");
      listed += static_cast<std::int64_t>(result.selection.size());
    } catch (const Error& error) {
      ADD_FAILURE() << describe(c) << "\n" << error.what();
    }
  }
  RecordProperty("swaps", std::to_string(swaps));
  EXPECT_LE(swaps, listed / 1000) << "blocks chosen otherwise within the rounding of scores";
}

/// Compares rows with the same selection.
TEST_P(FastAgreement, MatchesTheReferenceOnRandomCases) {
  const auto& [backend, shard] = GetParam();
  for (std::uint64_t i = 0; i < kCasesOfAShard && !HasFailure(); ++i) {
    const Case c = random_case(100000 + shard * kCasesOfAShard + i);
    const Result found = run_attention(c, {.backend = backend, .parallel = serial()});
    const Result expected = run_attention(c, {.backend = "reference", .parallel = serial()});
    const double unit = c.dtype == DType::f32 ? 0x1p-23 : c.dtype == DType::bf16 ? 0x1p-7 : 0x1p-10;
    const double largest_v = largest(c.v);
    for (std::int64_t head = 0; head < c.q_heads() && !HasFailure(); ++head) {
      for (std::int64_t token = 0; token < c.queries(); ++token) {
        if (found.row(head, token) != expected.row(head, token)) continue;
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          const double a = found.out.get(token, head, d), b = expected.out.get(token, head, d);
          if (std::isnan(a) && std::isnan(b)) continue;
          // Logits of the largest values reach some hundreds, and f32 rounds them by some 1e-5. Weights may
          // be rounded to the storage type.
          ASSERT_NEAR(a, b, 2e-4 + unit * (std::fabs(b) + largest_v)) << describe(c);
        }
      }
    }
  }
}

std::string name_of_shard(const testing::TestParamInfo<Agreement::ParamType>& instance) {
  return std::get<0>(instance.param) + "_" + std::to_string(std::get<1>(instance.param));
}

std::vector<std::string> fast_backends() {
  std::vector<std::string> names = host_backends();
  std::erase(names, "reference");
  return names;
}

INSTANTIATE_TEST_SUITE_P(All, Agreement,
                         testing::Combine(testing::ValuesIn(host_backends()),
                                          testing::Range<std::uint64_t>(0, kShards)),
                         name_of_shard);
INSTANTIATE_TEST_SUITE_P(All, FastAgreement,
                         testing::Combine(testing::ValuesIn(fast_backends()),
                                          testing::Range<std::uint64_t>(0, kShards)),
                         name_of_shard);

using LongAgreement = EveryBackend;

/// Uses enough tokens and blocks for several key tiles, ranges and passes of a fast backend.
TEST_P(LongAgreement, MatchesTheOracleOnLongSequences) {
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 2, .top_k = 5, .sink_blocks = 1},
      {.block_size = 1, .top_k = 9},
      {.block_size = 300, .top_k = 2},
      {.block_size = 7, .top_k = 20, .causal = false},
      {.block_size = 48, .top_k = 4, .sink_blocks = 1, .causal = false, .own_block = true},
      Routing::full(),
      Routing::full(false),
  };
  std::uint64_t seed = 500;
  for (const Routing& routing : routings) {
    for (const std::int64_t queries : {1100, 37}) {
      Case c{.seed = ++seed, .heads_per_kv = 3, .head_dim = 24, .sequences = one_sequence(queries, 1100)};
      c.routing = routing;
      fill(c);
      check_result(c, run_attention(c, execution()), exact());
    }
  }
}

/// Covers head dimensions beyond those of the random cases.
TEST_P(LongAgreement, MatchesTheOracleAtEveryHeadDimension) {
  for (const std::int64_t head_dim : {1, 3, 7, 15, 16, 31, 40, 80, 96, 100, 128, 200, 255, 256}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      Case c{.dtype = dtype, .heads_per_kv = 2, .head_dim = head_dim, .sequences = one_sequence(45)};
      c.routing = {.block_size = 8, .top_k = 3};
      c.q_layout = Layout::padded;
      fill(c);
      check_result(c, run_attention(c, execution()), exact());
    }
  }
}

MOBA_FOR_EVERY_BACKEND(LongAgreement);

}  // namespace
}  // namespace moba::test
