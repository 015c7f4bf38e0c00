// Calls from many threads, inside other parallel loops, and ended early by the caller.
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "backends.h"
#include "cases.h"

namespace moba::test {
namespace {

/// Cancels a call when it has asked `left` times; never if negative.
struct Countdown {
  std::int64_t left = 0, asked = 0;

  std::function<bool()> cancelled() {
    return [this] { return asked++ == left; };
  }
};

Case threaded_case(std::uint64_t seed) {
  return plain_case(seed, 300, 300, {.block_size = 16, .top_k = 4});
}

/// Runs both passes.
void run_both(const Case& c, const Execution& execution) {
  Result forward(c);
  attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, forward.outputs(), execution);
  const Array dq(c.dtype, c.queries(), c.q_heads(), c.head_dim),
      dk(c.dtype, c.keys(), c.kv_heads, c.head_dim), dv(c.dtype, c.keys(), c.kv_heads, c.head_dim);
  attention_backward(c.q.view(), c.q.view(), c.k.view(), c.v.view(),
                     {.out = forward.out.view(), .lse = forward.outputs().lse}, c.sequences, c.routing,
                     {dq.view(), dk.view(), dv.view()}, execution);
}

using Cancelling = EveryBackend;

TEST_P(Cancelling, EndsTheCallWhereverItIsAsked) {
  const Case c = threaded_case(1);
  Countdown never{.left = -1};
  run_both(c, {.backend = GetParam(), .parallel = serial(), .cancelled = never.cancelled()});
  ASSERT_GT(never.asked, 10);
  for (std::int64_t left = 0; left < never.asked; left += 1 + never.asked / 100) {
    Countdown few{.left = left};
    std::int64_t held = 0;
    const Allocator counted{[&](std::size_t bytes) {
                              ++held;
                              return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
                            },
                            [&](void* memory, std::size_t) {
                              --held;
                              std::free(memory);
                            }};
    try {
      run_both(
          c, {.backend = GetParam(), .parallel = serial(), .scratch = counted, .cancelled = few.cancelled()});
      FAIL() << "not cancelled when asked " << left << " times";
    } catch (const Cancelled& error) {
      EXPECT_TRUE(std::string(error.what()).ends_with(": cancelled")) << error.what();
    }
    EXPECT_EQ(few.asked, left + 1);
    EXPECT_EQ(held, 0);
  }
}

TEST_P(Cancelling, ACallCancelledFromTheStartWritesNothing) {
  const Case c = threaded_case(2);
  Result found(c);
  const Result untouched = found;
  EXPECT_THROW(attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, found.outputs(),
                         {.backend = GetParam(), .cancelled = [] { return true; }}),
               Cancelled);
  EXPECT_TRUE(found == untouched);
}

TEST_P(Cancelling, AskingChangesNothing) {
  const Case c = threaded_case(3);
  EXPECT_TRUE(run_attention(c, {.backend = GetParam(), .cancelled = [] { return false; }}) ==
              run_attention(c, execution()));
}

using Threads = EveryBackend;

TEST_P(Threads, CallsFromManyThreadsGiveTheSameBits) {
  std::vector<Case> cases;
  std::vector<Result> expected;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    cases.push_back(threaded_case(seed));
    expected.push_back(run_attention(cases.back(), execution()));
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      for (std::size_t i = 0; i < cases.size(); ++i) {
        const std::size_t at = (caller + i) % cases.size();
        const Result found = run_attention(cases[at], {.backend = GetParam(), .parallel = openmp(2)});
        if (!(found == expected[at])) ++wrong;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

#ifndef __SANITIZE_THREAD__
TEST_P(Threads, CallsInsideAParallelRegionGiveTheSameBits) {
  const Case c = threaded_case(4);
  const Result expected = run_attention(c, execution());
  int wrong = 0;
#pragma omp parallel for num_threads(3) reduction(+ : wrong)
  for (int caller = 0; caller < 6; ++caller) {
    if (!(run_attention(c, {.backend = GetParam()}) == expected)) ++wrong;
  }
  EXPECT_EQ(wrong, 0);
}

TEST_P(Threads, CallsAfterAForkGiveTheSameBits) {
  const Case c = threaded_case(5);
  const Execution threads{.backend = GetParam(), .parallel = openmp(2)};
  const Result expected = run_attention(c, threads);  // OpenMP's threads exist before the fork
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    _exit(run_attention(c, threads) == expected ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}
#endif

MOBA_FOR_EVERY_BACKEND(Cancelling);
MOBA_FOR_EVERY_BACKEND(Threads);

}  // namespace
}  // namespace moba::test
