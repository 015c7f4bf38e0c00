// Settings that change no bit of the result: threads, their runtime, workspace.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "backends.h"
#include "cases.h"

namespace moba::test {
namespace {

using Determinism = EveryBackend;

/// Returns small random cases, and some with work for many threads, which get ranges of queries of different
/// lengths.
std::vector<Case> cases() {
  std::vector<Case> list;
  for (std::uint64_t seed = 7000; seed < 7040; ++seed) list.push_back(random_case(seed));
  Case c{.seed = 1,
         .kv_heads = 2,
         .heads_per_kv = 2,
         .head_dim = 20,
         .sequences = {{0, 700, 730}, {0, 700, 1000}}};
  const auto add = [&](DType dtype, const Routing& routing) {
    c.dtype = dtype;
    c.routing = routing;
    fill(c);
    list.push_back(c);
  };
  add(DType::f32, {.block_size = 16, .top_k = 4});
  add(DType::bf16, {.block_size = 290, .top_k = 2});
  add(DType::f32, Routing::full());
  add(DType::bf16, Routing::full());
  return list;
}

TEST_P(Determinism, AnyThreadsGiveTheSameBits) {
  for (const Case& c : cases()) {
    const Result expected = run_attention(c, execution());
    for (const Parallel& parallel :
         {serial(), openmp(1), openmp(2), openmp(7), std_threads(1), std_threads(2), std_threads(7)}) {
      const Result found = run_attention(c, {.backend = GetParam(), .parallel = parallel});
      ASSERT_TRUE(found == expected) << describe(c) << ", " << parallel.threads << " threads";
    }
  }
}

TEST_P(Determinism, TasksInAnyOrderGiveTheSameBits) {
  const Parallel backwards{3, [](std::int64_t tasks, const Parallel::Body& body) {
                             for (std::int64_t task = tasks; task-- > 0;)
                               body(task, static_cast<int>(task % 3));
                           }};
  for (const Case& c : cases()) {
    const Result found = run_attention(c, {.backend = GetParam(), .parallel = backwards});
    ASSERT_TRUE(found == run_attention(c, execution())) << describe(c);
  }
}

TEST_P(Determinism, AnyWorkspaceGivesTheSameBitsOrThrows) {
  for (const Case& c : cases()) {
    const Result expected = run_attention(c, execution());
    bool refused = false;
    for (std::size_t budget = std::size_t{1} << 24; budget > 0; budget /= 2) {
      Profile profile;
      const Execution tight{
          .backend = GetParam(), .parallel = openmp(2), .workspace_bytes = budget, .profile = &profile};
      try {
        const Result found = run_attention(c, tight);
        ASSERT_FALSE(refused && c.queries() > 0) << describe(c) << ": " << budget << " bytes do, more do not";
        ASSERT_TRUE(found == expected) << describe(c) << ", workspace_bytes " << budget;
        ASSERT_LE(profile.workspace_bytes, budget) << describe(c);
      } catch (const Error& error) {
        refused = true;
        ASSERT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
      }
    }
  }
}

TEST_P(Determinism, SmallerLimitReducesTheWorkspace) {
  Case c{.seed = 2, .kv_heads = 2, .head_dim = 16, .sequences = one_sequence(4000)};
  c.routing = {.block_size = 16, .top_k = 8};
  fill(c);
  Profile roomy, tight;
  const Result expected = run_attention(c, {.backend = GetParam(), .parallel = serial(), .profile = &roomy});
  const Result found = run_attention(c, {.backend = GetParam(),
                                         .parallel = serial(),
                                         .workspace_bytes = roomy.workspace_bytes * 2 / 3,
                                         .profile = &tight});
  EXPECT_TRUE(found == expected);
  EXPECT_LT(tight.workspace_bytes, roomy.workspace_bytes);
}

TEST_P(Determinism, ScratchComesFromTheCallersAllocatorAndIsReleased) {
  std::map<void*, std::size_t> held;
  std::size_t given = 0;
  const Allocator counting{[&](std::size_t bytes) {
                             void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
                             std::fill_n(static_cast<unsigned char*>(memory), bytes,
                                         static_cast<unsigned char>(0xFF));
                             held[memory] = bytes;
                             given += bytes;
                             return memory;
                           },
                           [&](void* memory, std::size_t bytes) {
                             ASSERT_EQ(held.at(memory), bytes);
                             held.erase(memory);
                             std::free(memory);
                           }};
  for (const Case& c : cases()) {
    const Result found =
        run_attention(c, {.backend = GetParam(), .parallel = openmp(2), .scratch = counting});
    EXPECT_TRUE(held.empty()) << describe(c);
    ASSERT_TRUE(found == run_attention(c, execution())) << describe(c);
  }
  EXPECT_GT(given, 0U);
}

MOBA_FOR_EVERY_BACKEND(Determinism);

}  // namespace
}  // namespace moba::test
