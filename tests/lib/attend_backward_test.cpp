// Gradients against finite differences of the forward, in f64, and across storage types.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>

#include "backends.h"
#include "cases.h"

namespace moba::test {
namespace {

struct Differentiated {
  Array dq, dk, dv;
};

Differentiated backward(const Case& c, const Array& d_out, Result& forward, const Execution& execution,
                        bool with_selection = true) {
  Differentiated d{Array(c.dtype, c.queries(), c.q_heads(), c.head_dim, c.out_layout),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim, c.out_layout),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim, c.out_layout)};
  const Outputs outputs = forward.outputs();
  attention_backward(
      d_out.view(), c.q.view(), c.k.view(), c.v.view(),
      {.out = outputs.out, .lse = outputs.lse, .selection = with_selection ? outputs.selection : nullptr},
      c.sequences, c.routing, {d.dq.view(), d.dk.view(), d.dv.view()}, execution);
  return d;
}

Array gradient_for(const Case& c) {
  Case other = c;
  other.seed = c.seed + 99;
  other.values = Values::normal;
  other.q_layout = Layout::padded;
  fill(other);
  return other.q;
}

/// Returns <d_out, attention(c)>, whose gradients the backward pass computes.
double loss(const Case& c, const Array& d_out, const Execution& execution) {
  const Result result = run_attention(c, execution);
  double sum = 0;
  for (std::int64_t token = 0; token < c.queries(); ++token) {
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      for (std::int64_t d = 0; d < c.head_dim; ++d)
        sum += d_out.get(token, head, d) * result.out.get(token, head, d);
    }
  }
  return sum;
}

/// Compares the derivative along a random direction of one input by central differences with the gradient's.
void check_direction(const Case& c, Array Case::*input, const Array& gradient, const Array& d_out,
                     const Execution& execution, std::mt19937_64& engine) {
  constexpr double kStep = 1e-5;
  std::normal_distribution<double> normal;
  const Array before = c.*input;
  Case up = c, down = c;
  double expected = 0, size = 0;
  for (std::int64_t token = 0; token < before.tokens(); ++token) {
    for (std::int64_t head = 0; head < before.heads(); ++head) {
      for (std::int64_t d = 0; d < before.head_dim(); ++d) {
        const double direction = normal(engine), at = before.get(token, head, d);
        (up.*input).set(token, head, d, at + kStep * direction);
        (down.*input).set(token, head, d, at - kStep * direction);
        expected += direction * gradient.get(token, head, d);
        size += std::fabs(direction * gradient.get(token, head, d));
      }
    }
  }
  const double found = (loss(up, d_out, execution) - loss(down, d_out, execution)) / (2 * kStep);
  EXPECT_NEAR(found, expected, 1e-7 * (1 + size)) << describe(c);
}

Case backward_case(std::uint64_t seed) {
  Case c = random_case(seed);
  c.values = Values::normal;
  c.k_layout = c.k_layout == Layout::shared_heads ? Layout::padded : c.k_layout;
  c.v_layout = c.v_layout == Layout::shared_heads ? Layout::reversed : c.v_layout;
  c.head_dim = std::min<std::int64_t>(c.head_dim, 17);
  return c;
}

TEST(AttendBackward, MatchesFiniteDifferences) {
  const Execution execution{.backend = "reference", .parallel = serial()};
  std::mt19937_64 engine(1);
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    Case c = backward_case(seed);
    c.dtype = DType::f64;
    fill(c);
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution);
    const Differentiated d = backward(c, d_out, forward, execution);
    EXPECT_TRUE(d.dq.gaps_untouched() && d.dk.gaps_untouched() && d.dv.gaps_untouched()) << describe(c);
    check_direction(c, &Case::q, d.dq, d_out, execution, engine);
    check_direction(c, &Case::k, d.dk, d_out, execution, engine);
    check_direction(c, &Case::v, d.dv, d_out, execution, engine);
  }
}

using BackwardOfBackend = EveryBackend;

/// Uses logits whose rounding exceeds 1: recomputed weights must not exceed 1, nor dv the sum of d_out.
TEST_P(BackwardOfBackend, LargeLogitsGiveWeightsOfAtMostOne) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const double magnitude = dtype == DType::f16 ? 1e2 : 3e3;
    for (const Routing& routing : {Routing::full(), Routing{.block_size = 16, .top_k = 3}}) {
      Case c = plain_case(3, 100, 100, routing);
      c.dtype = dtype;
      c.head_dim = 64;
      fill(c);
      Array d_out(c.dtype, c.queries(), c.q_heads(), c.head_dim);
      for (std::int64_t token = 0; token < c.queries(); ++token) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          c.q.set(token, 0, d, magnitude * c.q.get(token, 0, d));
          c.k.set(token, 0, d, magnitude * c.k.get(token, 0, d));
          d_out.set(token, 0, d, 1);
        }
      }
      Result forward = run_attention(c, execution());
      const Differentiated found = backward(c, d_out, forward, execution());
      EXPECT_LE(largest(found.dv), 101) << describe(c);
      EXPECT_TRUE(std::isfinite(largest(found.dq)) && std::isfinite(largest(found.dk))) << describe(c);
    }
  }
}

bool same(const Differentiated& a, const Differentiated& b) {
  return a.dq.bytes() == b.dq.bytes() && a.dk.bytes() == b.dk.bytes() && a.dv.bytes() == b.dv.bytes();
}

double largest_difference(const Array& a, const Array& b) {
  double max_difference = 0;
  for (std::int64_t token = 0; token < a.tokens(); ++token) {
    for (std::int64_t head = 0; head < a.heads(); ++head) {
      for (std::int64_t d = 0; d < a.head_dim(); ++d)
        max_difference = std::max(max_difference, std::fabs(a.get(token, head, d) - b.get(token, head, d)));
    }
  }
  return max_difference;
}

bool row_is_finite(const Array& array, std::int64_t token, std::int64_t head) {
  for (std::int64_t d = 0; d < array.head_dim(); ++d) {
    if (!std::isfinite(array.get(token, head, d))) return false;
  }
  return true;
}

/// Returns whether a row attends to a key, in causal attention of one sequence with as many queries as keys.
bool attends(const Case& c, const Result& forward, std::int64_t head, std::int64_t query, std::int64_t key) {
  if (key > query) return false;
  if (c.routing.top_k == Routing::kEverything) return true;
  const std::vector<std::int32_t> blocks = forward.row(head, query);
  return std::find(blocks.begin(), blocks.end(), key / c.routing.block_size) != blocks.end();
}

TEST_P(BackwardOfBackend, NonFiniteInputsReachOnlyGradientsThatDependOnThem) {
  constexpr std::int64_t kTokens = 150;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Routing& routing :
         {Routing::full(), Routing{.block_size = 32, .top_k = 3}, Routing{.block_size = 7, .top_k = 2}}) {
      for (const int place : {0, 1, 2, 3}) {  // in q, k, v, d_out
        for (const double bad : {std::nan(""), HUGE_VAL}) {
          Case c = plain_case(static_cast<std::uint64_t>(place) + 5, kTokens, kTokens, routing);
          c.dtype = dtype;
          c.heads_per_kv = 2;
          c.head_dim = 40;
          fill(c);
          Array d_out = gradient_for(c);
          constexpr std::int64_t kBad = 70;
          const std::int64_t bad_head = place == 0 || place == 3 ? 1 : 0;
          Array& input = place == 0 ? c.q : place == 1 ? c.k : place == 2 ? c.v : d_out;
          input.set(kBad, bad_head, 3, bad);

          Result forward = run_attention(c, execution());
          const Differentiated found = backward(c, d_out, forward, execution());
          std::vector<bool> key_may_be(kTokens, false);
          for (std::int64_t head = 0; head < c.q_heads(); ++head) {
            for (std::int64_t query = 0; query < kTokens; ++query) {
              const bool depends = place == 0 || place == 3 ? query == kBad && head == bad_head
                                                            : attends(c, forward, head, query, kBad);
              EXPECT_TRUE(depends || row_is_finite(found.dq, query, head))
                  << describe(c) << " place " << place << " query " << query << " head " << head;
              for (std::int64_t key = 0; depends && key <= query; ++key) {
                if (attends(c, forward, head, query, key)) key_may_be[static_cast<std::size_t>(key)] = true;
              }
            }
          }
          for (std::int64_t key = 0; key < kTokens; ++key) {
            EXPECT_TRUE(key_may_be[static_cast<std::size_t>(key)] ||
                        (row_is_finite(found.dk, key, 0) && row_is_finite(found.dv, key, 0)))
                << describe(c) << " place " << place << " key " << key;
          }
        }
      }
    }
  }
}

TEST_P(BackwardOfBackend, MatchesTheReferenceInF64) {
  const std::map<DType, double> allowed = {{DType::f32, 2e-5}, {DType::bf16, 0.1}, {DType::f16, 0.01}};
  for (std::uint64_t seed = 1000; seed < 1100; ++seed) {
    const Case c = [&] {
      Case built = backward_case(seed);
      if (built.routing.scale) built.routing.scale = *built.routing.scale / 2;
      fill(built);
      return built;
    }();
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    const Differentiated found = backward(c, d_out, forward, execution());

    Case wide = c;
    wide.dtype = DType::f64;
    const auto widened = [](const Array& from) {
      Array to(DType::f64, from.tokens(), from.heads(), from.head_dim());
      for (std::int64_t token = 0; token < from.tokens(); ++token) {
        for (std::int64_t head = 0; head < from.heads(); ++head) {
          for (std::int64_t d = 0; d < from.head_dim(); ++d) to.set(token, head, d, from.get(token, head, d));
        }
      }
      return to;
    };
    wide.q = widened(c.q);
    wide.k = widened(c.k);
    wide.v = widened(c.v);
    const Execution reference{.backend = "reference", .parallel = serial()};
    Result wide_forward = run_attention(wide, reference);
    wide_forward.selection = forward.selection;
    const Differentiated expected = backward(wide, widened(d_out), wide_forward, reference);
    const double tolerance = allowed.at(c.dtype);
    EXPECT_LE(largest_difference(found.dq, expected.dq), tolerance) << describe(c);
    EXPECT_LE(largest_difference(found.dk, expected.dk), tolerance) << describe(c);
    EXPECT_LE(largest_difference(found.dv, expected.dv), tolerance) << describe(c);
  }
}

TEST_P(BackwardOfBackend, RecomputedSelectionGivesTheSameBits) {
  for (std::uint64_t seed = 2000; seed < 2040; ++seed) {
    Case c = backward_case(seed);
    fill(c);
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    EXPECT_TRUE(
        same(backward(c, d_out, forward, execution(), true), backward(c, d_out, forward, execution(), false)))
        << describe(c);
  }
}

TEST_P(BackwardOfBackend, AnyThreadsAndWorkspaceGiveTheSameBits) {
  for (std::uint64_t seed = 2100; seed < 2130; ++seed) {
    Case c = backward_case(seed);
    fill(c);
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    const Differentiated expected = backward(c, d_out, forward, execution());
    for (const Parallel& parallel : {serial(), openmp(2), openmp(7), std_threads(2), std_threads(7)}) {
      EXPECT_TRUE(same(backward(c, d_out, forward, {.backend = GetParam(), .parallel = parallel}), expected))
          << describe(c) << ", " << parallel.threads << " threads";
    }
    for (std::size_t budget = std::size_t{1} << 22; budget > 0; budget /= 2) {
      try {
        const Execution tight{.backend = GetParam(), .parallel = serial(), .workspace_bytes = budget};
        ASSERT_TRUE(same(backward(c, d_out, forward, tight), expected)) << describe(c) << ", " << budget;
      } catch (const Error& error) {
        ASSERT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
      }
    }
  }
}

TEST_P(BackwardOfBackend, OutOfRangeSavedSelectionThrows) {
  const Case c = plain_case(1, 30, 30, {.block_size = 4, .top_k = 3});
  const Array d_out = gradient_for(c);
  for (const std::int32_t block : {7, 100, std::numeric_limits<std::int32_t>::max()}) {
    Result forward = run_attention(c, execution());
    forward.outputs().selection[10 * forward.width] = block;
    try {
      backward(c, d_out, forward, execution());
      ADD_FAILURE() << "no error for block " << block;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what())
                    .find("attention_backward: saved.selection: expected blocks below 3 (those that the "
                          "query may see) or -1 for head 0, token 10, got block "),
                0U)
          << error.what();
    }
  }
}

TEST_P(BackwardOfBackend, UnorderedSavedSelectionThrows) {
  const Case c = plain_case(1, 30, 30, {.block_size = 4, .top_k = 3});
  const Array d_out = gradient_for(c);
  // Query 21 is in block 5: the own block first or twice, a block twice, and one after the padding.
  for (const std::array<std::int32_t, 3>& row : std::initializer_list<std::array<std::int32_t, 3>>{
           {5, 0, 1}, {0, 5, 5}, {2, 2, 5}, {0, 1, 2}, {0, -1, 5}}) {
    Result forward = run_attention(c, execution());
    std::copy(row.begin(), row.end(), forward.outputs().selection + 21 * forward.width);
    EXPECT_THROW(backward(c, d_out, forward, execution()), Error) << row[0] << " " << row[1] << " " << row[2];
  }
}

TEST_P(BackwardOfBackend, SavedSelectionMayHaveAnyStride) {
  for (std::uint64_t seed = 5200; seed < 5230; ++seed) {
    const Case c = random_case(seed);
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    const std::int64_t stride = forward.width + 2, rows = c.q_heads() * c.queries();
    std::vector<std::int32_t> selection(static_cast<std::size_t>(rows * stride));
    Outputs outputs = forward.outputs();
    outputs.selection = selection.data();
    outputs.selection_stride = stride;
    attention(c.q.view(), c.k.view(), c.v.view(), c.sequences, c.routing, outputs, execution());
    Differentiated found = backward(c, d_out, forward, execution(), false);
    const Saved saved{
        .out = outputs.out, .lse = outputs.lse, .selection = selection.data(), .selection_stride = stride};
    attention_backward(d_out.view(), c.q.view(), c.k.view(), c.v.view(), saved, c.sequences, c.routing,
                       {found.dq.view(), found.dk.view(), found.dv.view()}, execution());
    EXPECT_TRUE(same(found, backward(c, d_out, forward, execution()))) << describe(c);
  }
}

TEST_P(BackwardOfBackend, InvalidSavedSelectionThrows) {
  Case c{.seed = 5, .kv_heads = 4, .heads_per_kv = 2, .head_dim = 16};
  c.sequences = one_sequence(120);
  c.routing = {.block_size = 4, .top_k = 3};
  fill(c);
  const Array d_out = gradient_for(c);
  Result forward = run_attention(c, execution());
  Execution tight{.backend = GetParam(), .parallel = serial()};
  // The smallest workspace that one kv head fits in: four slices.
  for (std::size_t budget = 1024;; budget += budget / 8) {
    tight.workspace_bytes = budget;
    try {
      backward(c, d_out, forward, tight);
      break;
    } catch (const Error& error) {
      ASSERT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
    }
  }
  std::int32_t* selection = forward.outputs().selection;
  selection[((c.q_heads() - 1) * 120 + 100) * forward.width] = 29;  // a future block, for the last head

  Array dq = c.q, dk = c.k, dv = c.v;
  const Saved saved{.out = forward.out.view(), .lse = forward.outputs().lse, .selection = selection};
  EXPECT_THROW(attention_backward(d_out.view(), c.q.view(), c.k.view(), c.v.view(), saved, c.sequences,
                                  c.routing, {dq.view(), dk.view(), dv.view()}, tight),
               Error);
  EXPECT_EQ(largest_difference(dq, c.q), 0) << "dq was written";
  EXPECT_EQ(largest_difference(dk, c.k), 0) << "dk was written";
  EXPECT_EQ(largest_difference(dv, c.v), 0) << "dv was written";
}

/// Returns cases with enough tokens for several key tiles, ranges and rounds of a fast backend.
std::vector<Case> long_cases() {
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 2, .top_k = 5, .sink_blocks = 1},
      {.block_size = 600, .top_k = 2},
      {.block_size = 100, .top_k = 4, .sink_blocks = 3},
      {.block_size = 7, .top_k = 20, .causal = false},
      {.block_size = 300, .top_k = 2, .sink_blocks = 1, .causal = false, .own_block = true},
      Routing::full(),
      Routing::full(false),
  };
  std::vector<Case> list;
  for (const Routing& routing : routings) {
    for (const std::int64_t queries : {1300, 300}) {
      Case c{.seed = 600 + list.size(),
             .heads_per_kv = 2,
             .head_dim = 24,
             .sequences = one_sequence(queries, 1300)};
      c.routing = routing;
      c.out_layout = Layout::padded;
      fill(c);
      list.push_back(c);
    }
  }
  return list;
}

TEST_P(BackwardOfBackend, MatchesTheReferenceOnLongSequences) {
  if (exact()) GTEST_SKIP() << "it need not be compared with itself";
  for (const Case& c : long_cases()) {
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    const Differentiated found = backward(c, d_out, forward, execution());
    const Differentiated expected =
        backward(c, d_out, forward, {.backend = "reference", .parallel = openmp(2)});
    EXPECT_LE(largest_difference(found.dq, expected.dq), 1e-5) << describe(c);
    EXPECT_LE(largest_difference(found.dk, expected.dk), 1e-5 * (1 + largest(expected.dk))) << describe(c);
    EXPECT_LE(largest_difference(found.dv, expected.dv), 1e-5 * (1 + largest(expected.dv))) << describe(c);
    EXPECT_TRUE(found.dq.gaps_untouched() && found.dk.gaps_untouched() && found.dv.gaps_untouched());
  }
}

TEST_P(BackwardOfBackend, AnyThreadsGiveTheSameBitsOnLongSequences) {
  if (exact()) GTEST_SKIP() << "the reference is one loop whatever the length";
  for (const Case& c : long_cases()) {
    const Array d_out = gradient_for(c);
    Result forward = run_attention(c, execution());
    const Differentiated expected = backward(c, d_out, forward, execution());
    for (const Parallel& parallel : {openmp(2), openmp(7), std_threads(3)}) {
      Profile profile;
      const Differentiated found = backward(
          c, d_out, forward, {.backend = GetParam(), .parallel = parallel, .profile = &profile}, false);
      EXPECT_TRUE(same(found, expected)) << describe(c) << ", " << parallel.threads << " threads";
      const Differentiated tight = backward(c, d_out, forward,
                                            {.backend = GetParam(),
                                             .parallel = parallel,
                                             .workspace_bytes = profile.workspace_bytes + (1U << 20)});
      EXPECT_TRUE(same(tight, expected)) << describe(c);
    }
  }
}

MOBA_FOR_EVERY_BACKEND(BackwardOfBackend);

}  // namespace
}  // namespace moba::test
