// Blocks that the caller selects and gates with the caller's inputs, on the sm80 and the sm90 kernels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "device_case.h"
#include "moba/cache.h"
#include "on_sm90.h"
#include "selected.h"

namespace moba::test {
namespace {

class CudaSelection : public OnSm90, public testing::WithParamInterface<const char*> {
 protected:
  /// On a device of capability 9.0, sm90 kernels run what they support.
  CudaSelection() {
    if (GetParam() == std::string("sm80")) choose("sm80");
  }
  void SetUp() override {
    if (GetParam() == std::string("sm90")) OnSm90::SetUp();
  }
};

Result run_selected(Case c, const Selected& selected) {
  c.routing.selection = selected.view();
  Result result(c);
  const Outputs outputs{.out = on_device(result.out.view()), .lse = result.outputs().lse};
  attention(on_device(c.q.view()), on_device(c.k.view()), on_device(c.v.view()), c.sequences, c.routing,
            outputs);
  enter(selected, c, result);
  return result;
}

struct Differentiated {
  Array dq, dk, dv;
  bool operator==(const Differentiated& other) const {
    return dq.bytes() == other.dq.bytes() && dk.bytes() == other.dk.bytes() && dv.bytes() == other.dv.bytes();
  }
};

Differentiated run_backward(const Case& c, Array& d_out, Saved saved) {
  Differentiated d{Array(c.dtype, c.queries(), c.q_heads(), c.head_dim),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim),
                   Array(c.dtype, c.keys(), c.kv_heads, c.head_dim)};
  saved.out = on_device(saved.out);
  attention_backward(on_device(d_out.view()), on_device(c.q.view()), on_device(c.k.view()),
                     on_device(c.v.view()), saved, c.sequences, c.routing,
                     {on_device(d.dq.view()), on_device(d.dk.view()), on_device(d.dv.view())});
  return d;
}

Differentiated run_backward(Case c, const Selected& selected, Array& d_out, Result& forward) {
  c.routing.selection = selected.view();
  return run_backward(c, d_out, {.out = forward.out.view(), .lse = forward.outputs().lse});
}

/// A case of the device whose values are moderate, and whose rows are aligned.
Case moderate_case(std::uint64_t seed) {
  Case c = random_device_case(seed);
  c.values = Values::normal;
  c.routing.block_size = std::min<std::int64_t>(c.routing.block_size, 32);
  fill(c);
  return c;
}

TEST_P(CudaSelection, MatchesTheOracleOnRandomCases) {
  for (std::uint64_t seed = 700; seed < 740 && !HasFailure(); ++seed) {
    const Case c = moderate_case(seed);
    const Selected selected = random_selection(c, seed);
    const Result result = run_selected(c, selected);
    EXPECT_TRUE(result.fences_untouched()) << describe(c);
    check_attended(c, result, Rounding::partial);
  }
}

TEST_P(CudaSelection, GradientsMatchTheirDefinition) {
  for (std::uint64_t seed = 740; seed < 760 && !HasFailure(); ++seed) {
    const Case c = moderate_case(seed);
    const Selected selected = random_selection(c, seed);
    Result forward = run_selected(c, selected);
    Array d_out = gradient_for(c);
    const Differentiated found = run_backward(c, selected, d_out, forward);
    const TrueGradients expected = true_gradients(c, forward, d_out);
    const double tolerance = c.dtype == DType::bf16 ? 0.1 : 0.02;
    check_near(c, "dq", found.dq, expected.dq, tolerance);
    check_near(c, "dk", found.dk, expected.dk, tolerance);
    check_near(c, "dv", found.dv, expected.dv, tolerance);
  }
}

TEST_P(CudaSelection, GateSelectionGivesTheSameBits) {
  for (const bool causal : {true, false}) {
    Case c{.seed = 3, .dtype = DType::bf16, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 64};
    c.sequences = {{0, 60, 60, 130}, {0, 60, 65, 210}};
    c.routing = {.block_size = 16, .top_k = 3, .causal = causal};
    fill(c);
    Array d_out = gradient_for(c);
    Result gated = run_on_device(c);
    const Outputs outputs = gated.outputs();
    const Differentiated expected =
        run_backward(c, d_out, {.out = outputs.out, .lse = outputs.lse, .selection = outputs.selection});
    Selected selected(c.q_heads(), c.queries(), gated.width, 2);
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      for (std::int64_t token = 0; token < c.queries(); ++token) {
        std::copy_n(outputs.selection + (head * c.queries() + token) * gated.width, gated.width,
                    selected.row(head, token));
      }
    }
    Result found = run_selected(c, selected);
    EXPECT_EQ(found, gated);
    EXPECT_EQ(run_backward(c, selected, d_out, found), expected);
  }
}

TEST_P(CudaSelection, SharedRowsGiveTheBitsOfRepeatedOnes) {
  for (const std::int64_t heads : {1, 2, 4}) {
    Case c{.seed = 4, .dtype = DType::f16, .kv_heads = 2, .heads_per_kv = 4, .head_dim = 64};
    c.sequences = one_sequence(70, 130);
    c.routing = {.block_size = 16};
    fill(c);
    Selected shared(heads, 70, 4, 1), repeated(8, 70, 4, 0);
    for_each_row(c, heads, [&](std::int64_t head, std::int64_t token, std::int64_t own, std::int64_t) {
      std::vector<std::int32_t> row;
      for (const std::int32_t block : {static_cast<std::int32_t>((token + head) % 3), 3})
        if (block < own) row.push_back(block);
      row.push_back(static_cast<std::int32_t>(own));
      std::copy(row.begin(), row.end(), shared.row(head, token));
    });
    for (std::int64_t head = 0; head < 8; ++head) {
      for (std::int64_t token = 0; token < 70; ++token)
        std::copy_n(shared.row(head * heads / 8, token), 4, repeated.row(head, token));
    }
    Result a = run_selected(c, shared), b = run_selected(c, repeated);
    EXPECT_EQ(a, b) << heads;
    Array d_out = gradient_for(c);
    EXPECT_EQ(run_backward(c, shared, d_out, a), run_backward(c, repeated, d_out, b)) << heads;
  }
}

/// The device cannot throw: such entries are as if they were absent.
TEST_P(CudaSelection, EntriesThatAreNoBlocksAreIgnored) {
  for (const bool causal : {true, false}) {
    Case c{.seed = 5, .dtype = DType::bf16, .heads_per_kv = 2, .head_dim = 64};
    c.sequences = one_sequence(50, 90);
    c.routing = {.block_size = 16, .causal = causal};
    fill(c);
    Selected good(1, 50, 4, 0), bad = good;
    for_each_row(c, 1, [&](std::int64_t, std::int64_t token, std::int64_t own, std::int64_t seen) {
      std::int32_t *to = good.row(0, token), *worse = bad.row(0, token);
      to[0] = worse[0] = 1;
      if (causal) to[1] = worse[3] = static_cast<std::int32_t>(own);
      worse[1] = static_cast<std::int32_t>(causal ? own + 1 : seen);
      worse[2] = token % 2 == 0 ? 1 << 30 : -5;
    });
    Result expected = run_selected(c, good), found = run_selected(c, bad);
    EXPECT_EQ(found.out.bytes(), expected.out.bytes());
    EXPECT_EQ(found.lse, expected.lse);
    Array d_out = gradient_for(c);
    EXPECT_EQ(run_backward(c, bad, d_out, found), run_backward(c, good, d_out, expected));
  }
}

TEST_P(CudaSelection, RowsWithoutBlocksGiveZero) {
  Case c{.seed = 6, .dtype = DType::bf16, .heads_per_kv = 2, .head_dim = 64};
  c.sequences = one_sequence(20, 40);
  c.routing = {.block_size = 16, .causal = false};
  fill(c);
  for (const std::int64_t width : {0, 2}) {
    const Selected selected(2, 20, width, 0);
    Result result = run_selected(c, selected);
    EXPECT_EQ(largest(result.out), 0);
    for (std::int64_t token = 0; token < 20; ++token)
      EXPECT_EQ(result.lse_at(1, token), -std::numeric_limits<float>::infinity());
    Array d_out = gradient_for(c);
    const Differentiated d = run_backward(c, selected, d_out, result);
    EXPECT_EQ(largest(d.dq) + largest(d.dk) + largest(d.dv), 0);
  }
}

/// Pages of 24 tokens hold the sequences one after the other; blocks do not divide them.
TEST_P(CudaSelection, DecodedTokensMatchTheReference) {
  for (const std::int64_t head_dim : {64, 128}) {
    Case c{.seed = 7, .dtype = DType::f16, .kv_heads = 2, .heads_per_kv = 3, .head_dim = head_dim};
    const std::vector<std::int32_t> lengths{100, 0, 1, 47};
    c.sequences = {{0, 1, 2, 3, 4}, {0, 100, 100, 101, 148}};
    c.routing = {.block_size = 16};
    fill(c);
    constexpr std::int64_t kPage = 24, kPages = 5;
    Array k(c.dtype, 4 * kPages * kPage, 2, head_dim), v = k;
    for (std::size_t s = 0; s < 4; ++s) {
      for (std::int64_t token = 0; token < lengths[s]; ++token) {
        const std::int64_t to = static_cast<std::int64_t>(s) * kPages * kPage + token;
        for (std::int64_t head = 0; head < 2; ++head) {
          for (std::int64_t d = 0; d < head_dim; ++d) {
            k.set(to, head, d, c.k.get(c.sequences.cu_seqlens_k[s] + token, head, d));
            v.set(to, head, d, c.v.get(c.sequences.cu_seqlens_k[s] + token, head, d));
          }
        }
      }
    }
    const auto in_pages = [&](const Array& array) {
      Tensor t = on_device(array.view());
      t.rank = 4;
      t.sizes = {4 * kPages, kPage, 2, head_dim};
      t.strides = {kPage * t.strides[0], t.strides[0], t.strides[1], 1};
      return t;
    };
    const PagedCache cache{.k = in_pages(k),
                           .v = in_pages(v),
                           .table_stride = kPages,
                           .lengths = lengths.data(),
                           .sequences = 4,
                           .max_seqlen_k = 100};
    for (std::uint64_t seed = 20; seed < 28; ++seed) {
      const Selected selected = random_selection(c, seed);
      Case given = c;
      given.routing.selection = selected.view();
      Result result(given);
      decode(on_device(c.q.view()), cache, given.routing,
             {.out = on_device(result.out.view()), .lse = result.outputs().lse});
      enter(selected, given, result);
      EXPECT_TRUE(result.fences_untouched());
      check_attended(c, result, Rounding::fast);
    }
  }
}

/// Small integers: scores are exact and often equal. Some are NaN.
Array gate_tensor(DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t head_dim,
                  std::mt19937_64& engine) {
  Array array(dtype, rows, heads, head_dim, Layout::aligned);
  std::uniform_int_distribution<int> value(-2, 2), rare(0, 600);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t d = 0; d < head_dim; ++d)
        array.set(row, head, d, rare(engine) == 0 ? std::numeric_limits<double>::quiet_NaN() : value(engine));
    }
  }
  return array;
}

TEST_P(CudaSelection, GateInputsSelectAsTheReference) {
  std::mt19937_64 engine(5);
  const Sequences sequences{{0, 40, 40, 77}, {0, 40, 45, 245}};
  for (const std::int64_t head_dim : {64, 96, 128, 256}) {
    for (const Routing& routing :
         {Routing{.block_size = 4, .top_k = 6, .sink_blocks = 1}, Routing{.block_size = 3, .top_k = 20},
          Routing{.block_size = 7, .top_k = 4, .causal = false, .own_block = true}, Routing::full()}) {
      const DType dtype = head_dim % 64 == 0 ? DType::bf16 : DType::f16;
      const auto blocks_of = [&](std::int64_t keys) {
        return keys / routing.block_size + (keys % routing.block_size == 0 ? 0 : 1);
      };
      const Array q = gate_tensor(dtype, 77, 4, head_dim, engine),
                  k = gate_tensor(dtype, blocks_of(40) + blocks_of(5) + blocks_of(200), 2, head_dim, engine);
      const std::int64_t width = selection_width(sequences, routing);
      std::vector<std::int32_t> expected(static_cast<std::size_t>(4 * 77 * width)), found = expected;
      select_blocks(GateInputs{q.view(), k.view()}, sequences, routing, expected.data(),
                    {.backend = "reference"});
      select_blocks(GateInputs{on_device(q.view()), on_device(k.view())}, sequences, routing, found.data());
      EXPECT_EQ(found, expected) << "D " << head_dim << ", B " << routing.block_size;
    }
  }
}

TEST_P(CudaSelection, FeaturesMatchTheReference) {
  for (const std::int64_t head_dim : {64, 96, 128, 256}) {
    for (const std::int64_t block_size : {5, 32, 1000}) {
      Case c{.seed = 8, .dtype = DType::f16, .kv_heads = 2, .head_dim = head_dim};
      c.sequences = {{0, 70, 70, 171}, {0, 70, 70, 171}};
      c.routing = {.block_size = block_size};
      fill(c);
      c.k.set(40, 1, 3, std::numeric_limits<double>::quiet_NaN());
      std::int64_t blocks = 0;
      for (const std::int64_t keys : {70, 101}) blocks += (keys + block_size - 1) / block_size;
      const auto features_on = [&](bool device) {
        std::vector<Array> arrays(3, Array(c.dtype, blocks, 2, head_dim, Layout::aligned));
        const auto at = [&](std::size_t i) {
          return device ? on_device(arrays[i].view()) : arrays[i].view();
        };
        block_features(device ? on_device(c.k.view()) : c.k.view(), c.sequences.cu_seqlens_k, block_size,
                       {at(0), at(1), at(2)}, {.backend = device ? "cuda" : "reference"});
        return arrays;
      };
      const std::vector<Array> found = features_on(true), expected = features_on(false);
      for (std::size_t i = 0; i < 3; ++i) {
        for (std::int64_t block = 0; block < blocks; ++block) {
          for (std::int64_t d = 0; d < head_dim; ++d) {
            const double a = found[i].get(block, 1, d), b = expected[i].get(block, 1, d);
            ASSERT_TRUE((std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= (i == 0 ? 0x1p-9 : 0))
                << "feature " << i << ", block " << block << ", channel " << d;
          }
        }
      }
    }
  }
}

TEST_P(CudaSelection, InvalidGateInputsThrow) {
  const Array q(DType::bf16, 12, 4, 64), k(DType::bf16, 5, 2, 64), wide(DType::f32, 5, 2, 64),
      narrow(DType::bf16, 12, 4, 32), narrow_k(DType::bf16, 5, 2, 32), few(DType::bf16, 4, 2, 64);
  std::vector<std::int32_t> selection(4 * 12 * 2);
  const auto error_of = [&](const Array& queries, const Array& keys, std::int64_t tokens) -> std::string {
    try {
      select_blocks(GateInputs{on_device(queries.view()), on_device(keys.view())}, one_sequence(12, tokens),
                    {.block_size = 4, .top_k = 2}, selection.data());
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(error_of(q, k, 20), "");
  EXPECT_EQ(error_of(q, wide, 20),
            "select_blocks: gate.k: expected the dtype of gate.q, bf16 (backend cuda), got f32");
  EXPECT_EQ(error_of(narrow, narrow_k, 20),
            "select_blocks: q: expected head_dim 64, 96, 128 or 256 (backend cuda), got 32");
  EXPECT_EQ(
      error_of(q, few, 18),
      "select_blocks: gate.k: expected a row for every block, the incomplete last ones included (backend "
      "cuda), got 4");
}

INSTANTIATE_TEST_SUITE_P(Kernels, CudaSelection, testing::Values("sm80", "sm90"),
                         [](const auto& kernels) { return std::string(kernels.param); });

}  // namespace
}  // namespace moba::test
