// Attention whose result is known without an oracle, and edge-case inputs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "backends.h"
#include "oracle.h"

namespace moba::test {
namespace {

using Attend = EveryBackend;

TEST_P(Attend, SelectingEveryBlockIsDenseAttention) {
  for (const bool causal : {true, false}) {
    for (const auto& [queries, keys] : {std::pair(61, 61), std::pair(9, 61), std::pair(61, 40)}) {
      Case c = plain_case(1, queries, keys, {.block_size = 8, .top_k = (keys + 7) / 8, .causal = causal});
      const Result chosen = run_attention(c, execution());
      c.routing = Routing::full(causal);
      const Result dense = run_attention(c, execution());
      EXPECT_EQ(chosen.out.bytes(), dense.out.bytes());
      EXPECT_EQ(chosen.lse, dense.lse);
      check_attended(c, dense, exact());
    }
  }
}

TEST_P(Attend, OneTokenReturnsItsValue) {
  const Case c = plain_case(2, 1, 1, {});
  const Result result = run_attention(c, execution());
  for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(result.out.get(0, 0, d), c.v.get(0, 0, d));
}

TEST_P(Attend, QueriesBeforeTheFirstKeyAttendToNothing) {
  const Case c = plain_case(3, 12, 5, {.block_size = 2, .top_k = 2});
  const Result result = run_attention(c, execution());
  for (std::int64_t token = 0; token < 7; ++token) {
    EXPECT_EQ(result.lse_at(0, token), -std::numeric_limits<float>::infinity());
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(result.out.get(token, 0, d), 0);
  }
  EXPECT_TRUE(std::isfinite(result.lse_at(0, 7)));
}

TEST_P(Attend, EmptySequencesMatchTheOracle) {
  Case c{.kv_heads = 2, .heads_per_kv = 3, .head_dim = 20};
  c.sequences = {{0, 0, 30, 30, 30, 55, 60, 60}, {0, 0, 30, 30, 37, 62, 62, 62}};
  for (const Routing& routing :
       {Routing{.block_size = 8, .top_k = 2}, Routing::full(),
        Routing{.block_size = 8, .top_k = 2, .causal = false}, Routing::full(false)}) {
    c.routing = routing;
    fill(c);
    check_result(c, run_attention(c, execution()), exact());
  }
}

TEST_P(Attend, NoQueriesOrNoKeysMatchTheOracle) {
  for (const auto& [queries, keys] : {std::pair(0, 0), std::pair(0, 9), std::pair(9, 0)}) {
    for (const bool causal : {true, false}) {
      const Case c = plain_case(4, queries, keys, {.block_size = 4, .top_k = 2, .causal = causal});
      check_result(c, run_attention(c, execution()), exact());
    }
  }
}

TEST_P(Attend, UnselectedKeysDoNotAffectTheOutput) {
  Case c = plain_case(5, 64, 64, {.block_size = 8, .top_k = 2});
  const Result before = run_attention(c, execution());
  std::vector<bool> seen(8, false);
  for (const std::int32_t block : before.row(0, 63)) seen[static_cast<std::size_t>(block)] = true;
  for (std::int64_t token = 0; token < 64; ++token) {
    if (!seen[static_cast<std::size_t>(token / 8)]) c.v.set(token, 0, 3, 1e6);
  }
  const Result after = run_attention(c, execution());
  for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(after.out.get(63, 0, d), before.out.get(63, 0, d));
}

TEST_P(Attend, FutureKeysDoNotAffectTheOutput) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(),
                   kInfinity = std::numeric_limits<double>::infinity();
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const double future : {1e4, kInfinity, kNaN}) {
      Case c{.seed = 6, .dtype = dtype, .heads_per_kv = 3, .sequences = one_sequence(64)};
      c.routing = {.block_size = 16, .top_k = 2};
      fill(c);
      const Result before = run_attention(c, execution());
      for (std::int64_t token = 41; token < 64; ++token) {
        c.k.set(token, 0, 1, token % 2 == 0 ? kNaN : kInfinity);
        c.v.set(token, 0, 1, future);
      }
      const Result after = run_attention(c, execution());
      for (std::int64_t token = 0; token <= 40; ++token) {
        for (std::int64_t head = 0; head < 3; ++head) {
          EXPECT_EQ(after.row(head, token), before.row(head, token));
          for (std::int64_t d = 0; d < 16; ++d)
            EXPECT_EQ(after.out.get(token, head, d), before.out.get(token, head, d)) << "future " << future;
        }
      }
    }
  }
}

TEST_P(Attend, InfiniteKeysAndValuesReachOnlyRowsThatAttendToThem) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Case c{.seed = 8, .dtype = dtype, .sequences = one_sequence(48)};
    c.routing = Routing::full();
    fill(c);
    c.v.set(20, 0, 3, kInfinity);
    for (std::int64_t d = 0; d < 16; ++d) c.q.set(30, 0, d, std::abs(c.q.get(30, 0, d)));
    c.k.set(25, 0, 5, -kInfinity);  // a logit of -inf for query 30, which ignores key 25
    const Result result = run_attention(c, execution());
    EXPECT_TRUE(std::isfinite(result.out.get(19, 0, 3)));
    for (const std::int64_t token : {20, 22, 24, 30}) {
      EXPECT_EQ(result.out.get(token, 0, 3), kInfinity) << token;
      EXPECT_TRUE(std::isfinite(result.out.get(token, 0, 2))) << token;
    }
  }
}

TEST_P(Attend, HugeLogitsStayFinite) {
  Case c = plain_case(7, 40, 40, {.block_size = 8, .top_k = 3});
  for (std::int64_t token = 0; token < 40; ++token) {
    for (std::int64_t d = 0; d < 16; ++d) c.q.set(token, 0, d, 1e4 * c.q.get(token, 0, d));
  }
  check_result(c, run_attention(c, execution()), exact());
}

TEST_P(Attend, SequencesDoNotAttendToEachOther) {
  Case together{.kv_heads = 2, .heads_per_kv = 2, .sequences = {{0, 40, 70}, {0, 40, 90}}};
  together.routing = {.block_size = 8, .top_k = 3};
  fill(together);
  const Result expected = run_attention(together, execution());

  Case alone = together;
  alone.sequences = one_sequence(30, 50);
  Result found(alone);
  attention(together.q.slice(40, 30), together.k.slice(40, 50), together.v.slice(40, 50), alone.sequences,
            alone.routing, found.outputs(), execution());
  for (std::int64_t head = 0; head < 4; ++head) {
    for (std::int64_t token = 0; token < 30; ++token) {
      EXPECT_EQ(found.row(head, token), expected.row(head, 40 + token));
      for (std::int64_t d = 0; d < 16; ++d)
        ASSERT_NEAR(found.out.get(token, head, d), expected.out.get(40 + token, head, d), 1e-6);
    }
  }
}

MOBA_FOR_EVERY_BACKEND(Attend);

}  // namespace
}  // namespace moba::test
