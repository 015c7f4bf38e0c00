// The sm_90a forward kernel against the oracle, and the calls that use it.
#include <string>

#include "device_case.h"
#include "on_sm90.h"
#include "oracle.h"

namespace moba::test {
namespace {

class CudaSm90 : public OnSm90 {};

TEST_F(CudaSm90, MatchesTheOracleOnRandomCases) {
  constexpr std::uint64_t kCases = 30;
  std::int64_t swaps = 0, selected = 0;
  for (std::uint64_t seed = 9000; seed < 9000 + kCases && !HasFailure(); ++seed) {
    Case c = random_device_case(seed);
    c.head_dim = seed % 2 == 0 ? 64 : 128;
    fill(c);
    const auto has_strides = [](const Tensor& t) { return t.strides[0] > 0 && t.strides[1] > 0; };
    const bool fits = c.keys() > 0 && has_strides(c.k.view()) && has_strides(c.v.view());
    choose(fits ? "sm90" : "sm80");
    const Result result = run_on_device(c);
    swaps += check_result(c, result, Rounding::partial);
    selected += static_cast<std::int64_t>(result.selection.size());
  }
  EXPECT_LE(swaps, selected / 1000);
}

/// Covers several key tiles in a work tile, more work tiles than buffers, work tiles with fewer rows than a
/// warpgroup, and tails.
TEST_F(CudaSm90, ManyTilesMatchTheOracle) {
  choose("sm90");
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 200, .top_k = 2},
      {.block_size = 128, .top_k = 2, .causal = false},
      {.block_size = 160, .top_k = 2, .sink_blocks = 1, .causal = false, .own_block = true},
      {.block_size = 300, .top_k = 1, .scale = -0.2F},
      Routing::full(),
      Routing::full(false),
  };
  std::uint64_t seed = 700;
  for (const Routing& routing : routings) {
    for (const std::int64_t head_dim : {64, 128}) {
      const Case c = case_of(++seed, head_dim, routing, head_dim == 64 ? 430 : 90, 430);
      check_result(c, run_on_device(c), Rounding::partial);
    }
  }
}

/// Blocks of at most one key tile, each with several consecutive work tiles, which keep its keys in shared
/// memory.
TEST_F(CudaSm90, ConsecutiveTilesOfABlockMatchTheOracle) {
  choose("sm90");
  std::uint64_t seed = 720;
  for (const Routing& routing : {Routing{.block_size = 128, .top_k = 3, .causal = false},
                                 Routing{.block_size = 100, .top_k = 2, .causal = false},
                                 Routing{.block_size = 100, .top_k = 2, .sink_blocks = 1}}) {
    for (const std::int64_t head_dim : {64, 128}) {
      const Case c = case_of(++seed, head_dim, routing, 500, 500);
      check_result(c, run_on_device(c), Rounding::partial);
    }
  }
}

TEST_F(CudaSm90, AnyOrderOfWarpsAndCopiesGivesTheSameBits) {
  choose("sm90");
  const Case c = case_of(7, 64, {.block_size = 96, .top_k = 2}, 200, 300);
  const Result expected = run_on_device(c);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(run_on_device(c) == expected);
}

/// The TMA box of a block also loads the keys after its last one, which must not affect results.
TEST_F(CudaSm90, NonFiniteNeighbourSequencesDoNotLeak) {
  choose("sm90");
  Case c{.seed = 5, .dtype = DType::bf16, .head_dim = 64, .routing = {.block_size = 100, .top_k = 2}};
  c.sequences = {{0, 40, 80}, {0, 150, 300}};
  fill(c);
  const Result expected = run_on_device(c);
  for (std::int64_t token = 150; token < 300; ++token) {
    for (std::int64_t d = 0; d < 64; ++d) c.v.set(token, 0, d, std::numeric_limits<float>::quiet_NaN());
  }
  const Result found = run_on_device(c);
  for (std::int64_t token = 0; token < 40; ++token) {
    for (std::int64_t d = 0; d < 64; ++d)
      EXPECT_EQ(found.out.get(token, 0, d), expected.out.get(token, 0, d));
  }
}

TEST_F(CudaSm90, NonFiniteInputsReachOnlyRowsThatDependOnThem) {
  choose("sm90");
  check_non_finite_forward(128, {.block_size = 100, .top_k = 2});
  for (const Routing& routing :
       {Routing::full(), Routing{.block_size = 32, .top_k = 3}, Routing{.block_size = 7, .top_k = 2}})
    check_non_finite_forward(64, routing);
}

#ifdef MOBA_CUDA_EMULATION
bool was_used(const Case& c) {
  constexpr const char* kKernel = "attend_sm90";
  const int before = cuda::emulation::launches(kKernel);
  run_on_device(c);
  return cuda::emulation::launches(kKernel) > before;
}

TEST_F(CudaSm90, UsedForBlocksAbove64) {
  const Case large = case_of(1, 64, {.block_size = 128, .top_k = 2}, 20, 300);
  EXPECT_TRUE(was_used(large));
  EXPECT_FALSE(was_used(case_of(1, 64, {.block_size = 64, .top_k = 2}, 20, 300)));
  EXPECT_FALSE(was_used(case_of(1, 96, {.block_size = 128, .top_k = 2}, 20, 300)));
  choose("sm80");
  EXPECT_FALSE(was_used(large));
  choose("");
  cuda::emulation::capability() = 80;
  EXPECT_FALSE(was_used(large));
  cuda::emulation::capability() = 90;
  choose("sm90");
  EXPECT_TRUE(was_used(case_of(1, 128, {.block_size = 3, .top_k = 2}, 20, 30)));
}
#endif

TEST_F(CudaSm90, ForcedSm90WithoutSupportThrows) {
  const auto error_of = [](const Case& c) -> std::string {
    try {
      run_on_device(c);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  choose("sm90");
  const Case wide = case_of(1, 96, {.block_size = 128, .top_k = 2}, 20, 300);
  EXPECT_NE(error_of(wide).find("MOBA_CUDA_ARCH: expected sm80 where a build for sm_90a"), std::string::npos);
  choose("volta");
  EXPECT_NE(error_of(wide).find("MOBA_CUDA_ARCH: expected sm80 or sm90, got volta"), std::string::npos);
}

}  // namespace
}  // namespace moba::test
