// Whole forward calls on the emulated device against the oracle.
#include <gtest/gtest.h>

#include <cstdlib>

#include "device_case.h"
#include "oracle.h"

namespace moba::test {
namespace {

class CudaAgreement : public testing::TestWithParam<std::uint64_t> {};

/// Counts swaps of blocks whose scores differ by less than their rounding; they must stay rare.
TEST_P(CudaAgreement, MatchesTheOracleOnRandomCases) {
  constexpr std::uint64_t kCases = 40;
  std::int64_t swaps = 0, selected = 0;
  for (std::uint64_t i = 0; i < kCases && !HasFailure(); ++i) {
    const Case c = random_device_case(GetParam() * kCases + i);
    const Result result = run_on_device(c);
    swaps += check_result(c, result, Rounding::partial);
    selected += static_cast<std::int64_t>(result.selection.size());
  }
  RecordProperty("swaps", std::to_string(swaps));
  EXPECT_LE(swaps, selected / 1000);
}

INSTANTIATE_TEST_SUITE_P(All, CudaAgreement, testing::Range<std::uint64_t>(0, 4));

/// Covers several tiles of rows, keys and means; blocks selected by more rows than a tile holds; selections
/// too long for shared memory, and of several partitions.
TEST(CudaAttend, ManyTilesMatchTheOracle) {
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 2, .top_k = 5, .sink_blocks = 1},
      {.block_size = 1, .top_k = 9},
      {.block_size = 3, .top_k = 40},
      {.block_size = 150, .top_k = 1},
      {.block_size = 7, .top_k = 20, .causal = false},
      {.block_size = 48, .top_k = 4, .sink_blocks = 1, .causal = false, .own_block = true},
      Routing::full(),
      Routing::full(false),
  };
  std::uint64_t seed = 500;
  for (const Routing& routing : routings) {
    for (const std::int64_t queries : {230, 37}) {
      const Case c = case_of(++seed, 64, routing, queries, 230);
      check_result(c, run_on_device(c), Rounding::partial);
    }
  }
}

/// Block sizes for which a device of capability 9.0 has its own kernel.
TEST(CudaAttend, BlocksAbove64KeysMatchTheOracle) {
  for (const std::int64_t head_dim : {64, 128}) {
    Case c{.seed = 20 + static_cast<std::uint64_t>(head_dim),
           .dtype = DType::bf16,
           .heads_per_kv = 2,
           .head_dim = head_dim};
    c.sequences = one_sequence(200, 330);
    c.routing = {.block_size = 80, .top_k = 3};
    fill(c);
    check_result(c, run_on_device(c), Rounding::partial);
  }
}

TEST(CudaAttend, NonFiniteInputsReachOnlyRowsThatDependOnThem) {
  for (const std::int64_t head_dim : {64, 96, 128, 256})
    check_non_finite_forward(head_dim, {.block_size = 32, .top_k = 3});
  for (const Routing& routing : {Routing::full(), Routing{.block_size = 7, .top_k = 2}})
    check_non_finite_forward(64, routing);
}

TEST(CudaAttend, ManyShortSequencesMatchTheOracle) {
  Case c{.seed = 3, .dtype = DType::f16, .head_dim = 64, .routing = {.block_size = 2, .top_k = 2}};
  c.sequences = {{0}, {0}};
  for (int i = 0; i < 1200; ++i) {  // more starts than a launch carries
    c.sequences.cu_seqlens_q.push_back(c.sequences.cu_seqlens_q.back() + (i % 40 == 0 ? i / 40 % 7 : 0));
    c.sequences.cu_seqlens_k.push_back(c.sequences.cu_seqlens_q.back());
  }
  fill(c);
  check_result(c, run_on_device(c), Rounding::partial);
}

TEST(CudaAttend, AnyOrderOfBlocksAndWarpsGivesTheSameBits) {
  const Case c = case_of(7, 64, {.block_size = 16, .top_k = 4}, 230, 230);
  const Result expected = run_on_device(c);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(run_on_device(c) == expected);  // every run shuffles anew
}

TEST(CudaAttend, AnyWorkspaceGivesTheSameBitsOrThrows) {
  Case c{.seed = 11, .dtype = DType::bf16, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 64};
  c.sequences = {{0, 5, 5, 90}, {0, 9, 20, 110}};
  for (const Routing& routing :
       {Routing{.block_size = 16, .top_k = 3}, Routing{.block_size = 16, .top_k = 4, .causal = false}}) {
    c.routing = routing;
    fill(c);
    Profile roomy;
    const Result expected = run_on_device(c, {.profile = &roomy});
    bool refused = false;
    for (std::size_t budget = roomy.workspace_bytes; budget > 0; budget = budget * 2 / 5) {
      Profile profile;
      const Execution tight{.workspace_bytes = budget, .profile = &profile};
      try {
        const Result found = run_on_device(c, tight);
        ASSERT_FALSE(refused) << budget << " bytes do, more do not";
        ASSERT_TRUE(found == expected) << "workspace_bytes " << budget;
        ASSERT_LE(profile.workspace_bytes, budget);
      } catch (const Error& error) {
        refused = true;
        ASSERT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
      }
    }
    EXPECT_TRUE(refused);
  }
}

TEST(CudaAttend, DeviceSequencesGiveTheSameBits) {
  const Case c = random_device_case(12);
  const DeviceSequences sequences{c.sequences.cu_seqlens_q.data(), c.sequences.cu_seqlens_k.data(),
                                  static_cast<std::int64_t>(c.sequences.cu_seqlens_q.size()) - 1, c.keys()};
  Result result(c);
  Outputs outputs = result.outputs();
  outputs.out = on_device(outputs.out);
  outputs.selection = nullptr;
  attention(on_device(c.q.view()), on_device(c.k.view()), on_device(c.v.view()), sequences, c.routing,
            outputs);
  const Result expected = run_on_device(c);
  EXPECT_TRUE(result.out.bytes() == expected.out.bytes());
  EXPECT_EQ(selection_width(sequences, c.routing),
            std::min(c.routing.top_k, (c.keys() + c.routing.block_size - 1) / c.routing.block_size));
}

TEST(CudaAttend, SelectBlocksMatchesAttention) {
  const Case c = case_of(8, 64, {.block_size = 16, .top_k = 4}, 100, 230);
  Result found(c);
  select_blocks(on_device(c.q.view()), on_device(c.k.view()), c.sequences, c.routing,
                found.outputs().selection);
  EXPECT_EQ(found.selection, run_on_device(c).selection);
}

TEST(CudaAttend, ScratchComesFromTheCallersAllocatorAndIsReleased) {
  const Case c = case_of(9, 64, {.block_size = 16, .top_k = 4}, 100, 230);
  std::size_t held = 0, calls = 0;
  const Allocator counting{[&](std::size_t bytes) {
                             held += bytes;
                             ++calls;
                             return std::aligned_alloc(256, (bytes + 255) / 256 * 256);
                           },
                           [&](void* memory, std::size_t bytes) {
                             held -= bytes;
                             std::free(memory);
                           }};
  const Execution counted{.scratch = counting};
  EXPECT_TRUE(run_on_device(c, counted) == run_on_device(c));
  EXPECT_EQ(held, 0U);
  EXPECT_EQ(calls, 1U);
  const Allocator empty{[](std::size_t) -> void* { return nullptr; }, [](void*, std::size_t) {}};
  const Execution without_memory{.scratch = empty};
  EXPECT_THROW(run_on_device(c, without_memory), DeviceError);
}

}  // namespace
}  // namespace moba::test
