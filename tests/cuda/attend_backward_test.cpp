// Whole backward calls on the emulated device against the reference in f64, which sums the same inputs.
#include <cmath>
#include <limits>
#include <string>

#include "device_case.h"
#include "on_sm90.h"

namespace moba::test {
namespace {

struct Differentiated {
  Array dq, dk, dv;

  bool operator==(const Differentiated& other) const {
    return dq.bytes() == other.dq.bytes() && dk.bytes() == other.dk.bytes() && dv.bytes() == other.dv.bytes();
  }
  bool gaps_untouched() const { return dq.gaps_untouched() && dk.gaps_untouched() && dv.gaps_untouched(); }
};

struct Backpropagation {
  Case c;
  Array d_out;
  Result forward;

  explicit Backpropagation(const Case& of) : c(of), d_out(gradient_for(of)), forward(run_on_device(of)) {}

  Saved saved(bool with_selection) {
    const Outputs outputs = forward.outputs();
    return {on_device(outputs.out), outputs.lse, with_selection ? outputs.selection : nullptr};
  }

 private:
  static Array gradient_for(const Case& c) {
    Case other = c;
    other.seed = c.seed + 99;
    other.values = Values::normal;
    other.q_layout = Layout::aligned;
    fill(other);
    return other.q;
  }
};

Differentiated gradients_for(const Case& c, DType dtype, Layout layout) {
  return {Array(dtype, c.queries(), c.q_heads(), c.head_dim, layout),
          Array(dtype, c.keys(), c.kv_heads, c.head_dim, layout),
          Array(dtype, c.keys(), c.kv_heads, c.head_dim, layout)};
}

Differentiated backward(Backpropagation& b, const Execution& execution = {}, bool with_selection = true) {
  const Case& c = b.c;
  Differentiated d = gradients_for(c, c.dtype, c.out_layout);
  attention_backward(on_device(b.d_out.view()), on_device(c.q.view()), on_device(c.k.view()),
                     on_device(c.v.view()), b.saved(with_selection), c.sequences, c.routing,
                     {on_device(d.dq.view()), on_device(d.dk.view()), on_device(d.dv.view())}, execution);
  return d;
}

Array widened(const Array& from) {
  Array to(DType::f64, from.tokens(), from.heads(), from.head_dim());
  for (std::int64_t token = 0; token < from.tokens(); ++token) {
    for (std::int64_t head = 0; head < from.heads(); ++head) {
      for (std::int64_t d = 0; d < from.head_dim(); ++d) to.set(token, head, d, from.get(token, head, d));
    }
  }
  return to;
}

/// The reference's gradients in f64, given the device's selection.
Differentiated truth_of(Backpropagation& b) {
  Case wide = b.c;
  wide.dtype = DType::f64;
  wide.q = widened(b.c.q);
  wide.k = widened(b.c.k);
  wide.v = widened(b.c.v);
  const Array d_out = widened(b.d_out), out = widened(b.forward.out);
  Differentiated d = gradients_for(wide, DType::f64, Layout::contiguous);
  const Outputs outputs = b.forward.outputs();
  attention_backward(d_out.view(), wide.q.view(), wide.k.view(), wide.v.view(),
                     {.out = out.view(), .lse = outputs.lse, .selection = outputs.selection}, wide.sequences,
                     wide.routing, {d.dq.view(), d.dk.view(), d.dv.view()}, {.backend = "reference"});
  return d;
}

/// Gradients as frameworks compute them: f32 sums; weights and gradients of logits are rounded to the
/// storage type before they are multiplied by the inputs.
struct Plain {
  Differentiated gradients;
  double largest_slot = 0;  // of dq, through one block

  explicit Plain(Backpropagation& b) : gradients(gradients_for(b.c, DType::f64, Layout::contiguous)) {
    const Case& c = b.c;
    for (Array* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) clear(*gradient);
    for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_q.size(); ++s) {
      const std::int64_t q0 = c.sequences.cu_seqlens_q[s], q1 = c.sequences.cu_seqlens_q[s + 1];
      const std::int64_t k0 = c.sequences.cu_seqlens_k[s], keys = c.sequences.cu_seqlens_k[s + 1] - k0;
      for (std::int64_t token = q0; token < q1; ++token) {
        for (std::int64_t head = 0; head < c.q_heads(); ++head) {
          for (const std::int32_t block : b.forward.row(head, token)) {
            const std::int64_t begin = block * c.routing.block_size;
            std::int64_t end = std::min(begin + std::min(c.routing.block_size, keys), keys);
            if (c.routing.causal) end = std::min(end, token - q1 + keys + 1);
            add_block(b, head, token, k0 + begin, k0 + end);
          }
        }
      }
    }
  }

 private:
  static void clear(Array& array) {
    for (std::int64_t token = 0; token < array.tokens(); ++token) {
      for (std::int64_t head = 0; head < array.heads(); ++head) {
        for (std::int64_t d = 0; d < array.head_dim(); ++d) array.set(token, head, d, 0);
      }
    }
  }
  static void add(Array& to, std::int64_t token, std::int64_t head, std::int64_t d, float value) {
    to.set(token, head, d, static_cast<float>(to.get(token, head, d)) + value);
  }

  void add_block(Backpropagation& b, std::int64_t head, std::int64_t token, std::int64_t begin,
                 std::int64_t end) {
    const Case& c = b.c;
    const std::int64_t depth = c.head_dim, kv_head = head / c.heads_per_kv;
    const float scale = c.routing.scale.value_or(1 / std::sqrt(static_cast<float>(depth)));
    const auto at = [](const Array& a, std::int64_t t, std::int64_t h, std::int64_t d) {
      return static_cast<float>(a.get(t, h, d));
    };
    std::vector<float> slot(static_cast<std::size_t>(depth));
    float delta = 0;
    for (std::int64_t d = 0; d < depth; ++d)
      delta += at(b.d_out, token, head, d) * at(b.forward.out, token, head, d);
    for (std::int64_t key = begin; key < end; ++key) {
      float logit = 0, d_weight = 0;
      for (std::int64_t d = 0; d < depth; ++d) {
        logit += at(c.q, token, head, d) * at(c.k, key, kv_head, d);
        d_weight += at(b.d_out, token, head, d) * at(c.v, key, kv_head, d);
      }
      const float weight = std::exp(logit * scale - b.forward.lse_at(head, token));
      const auto rounded_weight = static_cast<float>(rounded(weight, c.dtype));
      const auto d_logit = static_cast<float>(rounded(weight * (d_weight - delta), c.dtype));
      for (std::int64_t d = 0; d < depth; ++d) {
        slot[static_cast<std::size_t>(d)] += scale * d_logit * at(c.k, key, kv_head, d);
        add(gradients.dk, key, kv_head, d, scale * d_logit * at(c.q, token, head, d));
        add(gradients.dv, key, kv_head, d, rounded_weight * at(b.d_out, token, head, d));
      }
    }
    for (std::int64_t d = 0; d < depth; ++d) {
      const float value = slot[static_cast<std::size_t>(d)];
      largest_slot = std::max(largest_slot, std::fabs(double{value}));
      add(gradients.dq, token, head, d, value);
    }
  }
};

double unit_of(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

/// Checks that the error is at most three times that of plain sums of rounded weights, plus one rounding of
/// the result.
void check_gradient(const char* name, const Array& found, const Array& truth, const Array& plain,
                    double slack) {
  double worst = 0;
  const auto for_each = [&](auto&& visit) {
    for (std::int64_t token = 0; token < truth.tokens(); ++token) {
      for (std::int64_t head = 0; head < truth.heads(); ++head) {
        for (std::int64_t d = 0; d < truth.head_dim(); ++d) visit(token, head, d);
      }
    }
  };
  for_each([&](std::int64_t t, std::int64_t h, std::int64_t d) {
    worst = std::max(worst, std::fabs(plain.get(t, h, d) - truth.get(t, h, d)));
  });
  const double allowed = 3 * worst + slack;
  for_each([&](std::int64_t t, std::int64_t h, std::int64_t d) {
    const double expected = truth.get(t, h, d), unit = unit_of(found.dtype());
    const double error = std::fabs(found.get(t, h, d) - expected);
    if (testing::Test::HasFailure() || error <= allowed + unit * std::fabs(expected) + 0x1p-24) return;
    ADD_FAILURE() << name << " of head " << h << ", token " << t << ", element " << d << " is "
                  << found.get(t, h, d) << "; " << expected << " is expected, give or take " << allowed;
  });
}

void check_backward(const Case& c) {
  SCOPED_TRACE(describe(c));
  Backpropagation b(c);
  const Differentiated found = backward(b);
  EXPECT_TRUE(found.gaps_untouched()) << "wrote outside its outputs";
  const Differentiated truth = truth_of(b);
  const Plain plain(b);
  // Several slots of a row, each rounded.
  const double slots = unit_of(c.dtype) * 2 * plain.largest_slot;
  // Remainder of f32 where gradients of weights cancel.
  const double residue = 0x1p-24 * static_cast<double>(c.head_dim) * largest(b.d_out) * largest(c.v);
  check_gradient("dq", found.dq, truth.dq, plain.gradients.dq, slots + residue * largest(c.k));
  check_gradient("dk", found.dk, truth.dk, plain.gradients.dk, residue * largest(c.q));
  check_gradient("dv", found.dv, truth.dv, plain.gradients.dv, 0);
}

/// Logits of which LSE, in f32, is off by more than 1: weights that are recomputed from it stay at most 1.
void check_large_logits(std::int64_t head_dim) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const double magnitude = dtype == DType::f16 ? 1e4 : 3e4;
    for (const Routing& routing : {Routing::full(), Routing{.block_size = 16, .top_k = 3}}) {
      Case c = case_of(3, head_dim, routing, 100, 100);
      c.dtype = dtype;
      fill(c);
      for (std::int64_t token = 0; token < 100; ++token) {
        for (std::int64_t d = 0; d < head_dim; ++d) {
          c.k.set(token, 0, d, magnitude * c.k.get(token, 0, d));
          for (std::int64_t head = 0; head < c.q_heads(); ++head)
            c.q.set(token, head, d, magnitude * c.q.get(token, head, d));
        }
      }
      Backpropagation b(c);
      for (std::int64_t token = 0; token < 100; ++token) {
        for (std::int64_t head = 0; head < c.q_heads(); ++head) {
          for (std::int64_t d = 0; d < head_dim; ++d) b.d_out.set(token, head, d, 1);
        }
      }
      const Differentiated found = backward(b);
      EXPECT_LE(largest(found.dv), 100 * c.heads_per_kv + 1) << describe(c);
      EXPECT_TRUE(std::isfinite(largest(found.dq)) && std::isfinite(largest(found.dk))) << describe(c);
    }
  }
}

/// A NaN and an infinity in q, k, v or d_out reach only the gradients that depend on them, NaN all of those.
void check_non_finite_backward(std::int64_t head_dim, const Routing& routing) {
  constexpr std::int64_t kTokens = 150, kBad = 70;
  for (const int place : {0, 1, 2, 3}) {  // in q, k, v, d_out
    for (const double bad : {std::nan(""), HUGE_VAL}) {
      Case c = case_of(static_cast<std::uint64_t>(place) + 5, head_dim, routing, kTokens, kTokens);
      const std::int64_t bad_head = place == 0 || place == 3 ? 1 : 0;
      if (place < 3) (place == 0 ? c.q : place == 1 ? c.k : c.v).set(kBad, bad_head, 3, bad);
      Backpropagation b(c);
      if (place == 3) b.d_out.set(kBad, bad_head, 3, bad);
      const Differentiated found = backward(b);
      const std::string where = describe(c) + " place " + std::to_string(place);
      std::vector<bool> key_depends(kTokens, false);
      for (std::int64_t head = 0; head < c.q_heads(); ++head) {
        for (std::int64_t query = 0; query < kTokens; ++query) {
          const bool depends = place == 0 || place == 3 ? query == kBad && head == bad_head
                                                        : attends(c, b.forward, head, query, kBad);
          EXPECT_TRUE(depends || row_is_finite(found.dq, query, head)) << where << " query " << query;
          EXPECT_FALSE(depends && std::isnan(bad) && row_is_finite(found.dq, query, head))
              << where << " query " << query;
          for (std::int64_t key = 0; depends && key <= query; ++key) {
            if (attends(c, b.forward, head, query, key)) key_depends[static_cast<std::size_t>(key)] = true;
          }
        }
      }
      for (std::int64_t key = 0; key < kTokens; ++key) {
        const bool depends = key_depends[static_cast<std::size_t>(key)];
        EXPECT_TRUE(depends || (row_is_finite(found.dk, key, 0) && row_is_finite(found.dv, key, 0)))
            << where << " key " << key;
        EXPECT_FALSE(depends && std::isnan(bad) && row_is_finite(found.dk, key, 0))
            << where << " key " << key;
      }
    }
  }
}

Case random_backward_case(std::uint64_t seed) {
  Case c = random_device_case(seed);
  if (c.values == Values::specials) c.values = Values::normal;
  fill(c);
  return c;
}

class CudaBackward : public testing::TestWithParam<std::uint64_t> {};

TEST_P(CudaBackward, MatchesTheReferenceOnRandomCases) {
  constexpr std::uint64_t kCases = 30;
  for (std::uint64_t i = 0; i < kCases && !HasFailure(); ++i)
    check_backward(random_backward_case(5000 + GetParam() * kCases + i));
}

INSTANTIATE_TEST_SUITE_P(All, CudaBackward, testing::Range<std::uint64_t>(0, 3));

/// Covers several tiles of rows, and blocks of several key tiles.
TEST(CudaAttendBackward, ManyTilesMatchTheReference) {
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 3, .top_k = 20, .sink_blocks = 1},
      {.block_size = 150, .top_k = 1},
      {.block_size = 140, .top_k = 1, .causal = false},
      {.block_size = 48, .top_k = 4, .sink_blocks = 1, .causal = false, .own_block = true},
      Routing::full(),
      Routing::full(false),
  };
  std::uint64_t seed = 500;
  for (const Routing& routing : routings) {
    for (const std::int64_t queries : {210, 37}) check_backward(case_of(++seed, 64, routing, queries, 210));
  }
}

/// At head_dim 256 warps share the sums of a row.
TEST(CudaAttendBackward, HeadDim256MatchesTheReference) {
  for (const Routing& routing : {Routing{.block_size = 70, .top_k = 2}, Routing::full()}) {
    check_backward(case_of(600, 256, routing, 140, 210));
  }
}

/// Enough rows select the first block that its gradients are summed in segments.
TEST(CudaAttendBackward, BlockSelectedByEveryRowMatchesTheReference) {
  Case c{.seed = 3, .dtype = DType::f16, .heads_per_kv = 8, .head_dim = 64};
  c.sequences = {{0, 20, 1180}, {0, 20, 1180}};
  c.routing = {.block_size = 2, .top_k = 2, .sink_blocks = 1};
  fill(c);
  check_backward(c);
}

TEST(CudaAttendBackward, LargeLogitsGiveWeightsOfAtMostOne) {
  for (const std::int64_t head_dim : {64, 256}) check_large_logits(head_dim);
}

TEST(CudaAttendBackward, NonFiniteInputsReachOnlyGradientsThatDependOnThem) {
  for (const std::int64_t head_dim : {64, 96, 128, 256})
    check_non_finite_backward(head_dim, {.block_size = 32, .top_k = 3});
  for (const Routing& routing : {Routing::full(), Routing{.block_size = 7, .top_k = 2}})
    check_non_finite_backward(64, routing);
}

TEST(CudaAttendBackward, RecomputedSelectionGivesTheSameBits) {
  for (std::uint64_t seed = 100; seed < 110; ++seed) {
    Backpropagation b(random_backward_case(seed));
    EXPECT_TRUE(backward(b, {}, true) == backward(b, {}, false)) << describe(b.c);
  }
}

TEST(CudaAttendBackward, AnyOrderOfBlocksAndWarpsGivesTheSameBits) {
  Backpropagation b(case_of(7, 64, {.block_size = 16, .top_k = 4}, 210, 210));
  const Differentiated expected = backward(b);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(backward(b) == expected);  // every run shuffles anew
}

TEST(CudaAttendBackward, AnyWorkspaceGivesTheSameBitsOrThrows) {
  Case c{.seed = 11, .dtype = DType::bf16, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 64};
  c.sequences = {{0, 5, 5, 90}, {0, 9, 20, 110}};
  for (const Routing& routing :
       {Routing{.block_size = 16, .top_k = 3}, Routing{.block_size = 16, .top_k = 4, .causal = false}}) {
    c.routing = routing;
    fill(c);
    Backpropagation b(c);
    Profile roomy;
    const Differentiated expected = backward(b, {.profile = &roomy});
    bool refused = false;
    for (std::size_t budget = roomy.workspace_bytes; budget > 0; budget = budget / 2) {
      Profile profile;
      try {
        const Differentiated found = backward(b, {.workspace_bytes = budget, .profile = &profile});
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

TEST(CudaAttendBackward, DeviceSequencesGiveTheSameBits) {
  const Case c = random_backward_case(12);
  Backpropagation b(c);
  const DeviceSequences sequences{c.sequences.cu_seqlens_q.data(), c.sequences.cu_seqlens_k.data(),
                                  static_cast<std::int64_t>(c.sequences.cu_seqlens_q.size()) - 1, c.keys()};
  Differentiated d = gradients_for(c, c.dtype, c.out_layout);
  attention_backward(on_device(b.d_out.view()), on_device(c.q.view()), on_device(c.k.view()),
                     on_device(c.v.view()), b.saved(false), sequences, c.routing,
                     {on_device(d.dq.view()), on_device(d.dk.view()), on_device(d.dv.view())});
  EXPECT_TRUE(d == backward(b));
}

TEST(CudaAttendBackward, UnselectedKeysHaveZeroGradient) {
  Case c{.seed = 5, .dtype = DType::bf16, .head_dim = 64, .routing = {.block_size = 4, .top_k = 2}};
  c.sequences = {{0, 0, 0}, {0, 7, 30}};
  fill(c);
  Backpropagation b(c);
  const Differentiated d = backward(b);
  EXPECT_EQ(largest(d.dk), 0);
  EXPECT_EQ(largest(d.dv), 0);
}

/// Entries that a row cannot have selected are ignored, since the device cannot throw.
TEST(CudaAttendBackward, InvalidSavedEntriesAreIgnored) {
  Backpropagation b(case_of(8, 64, {.block_size = 4, .top_k = 3}, 40, 210));
  Backpropagation less = b;
  for (std::int64_t head = 0; head < b.c.q_heads(); ++head) {
    const std::int64_t row = (head * 40 + 10) * b.forward.width;
    for (std::int64_t i = 0; i < b.forward.width; ++i) {
      constexpr std::int32_t kWrong[] = {2'000'000'000, 1'000, 53};
      b.forward.outputs().selection[row + i] = kWrong[i];
      less.forward.outputs().selection[row + i] = -1;
    }
  }
  EXPECT_TRUE(backward(b) == backward(less));
}

TEST(CudaAttendBackward, SelectionRowsMayHaveAnyStride) {
  for (const Routing& routing :
       {Routing{.block_size = 16, .top_k = 3}, Routing{.block_size = 16, .top_k = 4, .causal = false},
        Routing{.block_size = 16, .top_k = 1}, Routing::full()}) {
    Backpropagation b(case_of(8, 64, routing, 90, 150));
    const Case& c = b.c;
    const std::int64_t stride = b.forward.width + 2, rows = c.q_heads() * c.queries();
    std::vector<std::int32_t> selection(static_cast<std::size_t>(rows * stride), 77);
    Result forward(c);
    Outputs outputs = forward.outputs();
    outputs.out = on_device(outputs.out);
    outputs.selection = selection.data();
    outputs.selection_stride = stride;
    attention(on_device(c.q.view()), on_device(c.k.view()), on_device(c.v.view()), c.sequences, routing,
              outputs);
    EXPECT_EQ(forward.out.bytes(), b.forward.out.bytes());
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int32_t* blocks = selection.data() + row * stride;
      const std::int32_t* expected = b.forward.outputs().selection + row * b.forward.width;
      ASSERT_TRUE(std::equal(expected, expected + b.forward.width, blocks)) << "row " << row;
      ASSERT_EQ(std::count(blocks + b.forward.width, blocks + stride, -1), 2) << "row " << row;
    }
    Differentiated d = gradients_for(c, c.dtype, c.out_layout);
    const Saved saved{outputs.out, outputs.lse, selection.data(), stride};
    attention_backward(on_device(b.d_out.view()), on_device(c.q.view()), on_device(c.k.view()),
                       on_device(c.v.view()), saved, c.sequences, routing,
                       {on_device(d.dq.view()), on_device(d.dk.view()), on_device(d.dv.view())});
    EXPECT_TRUE(d == backward(b));
  }
}

TEST(CudaAttendBackward, InvalidArgumentsThrow) {
  Backpropagation b(random_backward_case(12));
  b.d_out = Array(b.c.dtype, b.c.queries(), b.c.q_heads(), b.c.head_dim, Layout::padded);
  try {
    backward(b);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find("attention_backward: d_out: expected rows aligned"), 0U)
        << error.what();
  }
}

/// The sm_90a kernels, which are used for block sizes above 64 unless MOBA_CUDA_ARCH is set.
class CudaSm90Backward : public OnSm90 {
 protected:
  CudaSm90Backward() { choose("sm90"); }
};

Case sm90_case(std::uint64_t seed, const Routing& routing, std::int64_t queries) {
  return case_of(seed, seed % 4 < 2 ? 64 : 128, routing, queries, 210);
}

TEST_F(CudaSm90Backward, MatchesTheReferenceOnRandomCases) {
  constexpr std::uint64_t kCases = 16;
  for (std::uint64_t seed = 7000; seed < 7000 + kCases && !HasFailure(); ++seed) {
    Case c = random_backward_case(seed);
    c.head_dim = seed % 2 == 0 ? 64 : 128;
    fill(c);
    const auto has_strides = [](const Tensor& t) { return t.strides[0] > 0 && t.strides[1] > 0; };
    choose(c.keys() > 0 && has_strides(c.k.view()) && has_strides(c.v.view()) ? "sm90" : "sm80");
    check_backward(c);
  }
}

TEST_F(CudaSm90Backward, ManyTilesMatchTheReference) {
  const std::vector<Routing> routings = {
      {.block_size = 64, .top_k = 3},
      {.block_size = 3, .top_k = 20, .sink_blocks = 1},
      {.block_size = 150, .top_k = 1, .scale = -0.2F},
      {.block_size = 140, .top_k = 1, .causal = false},
      {.block_size = 48, .top_k = 4, .sink_blocks = 1, .causal = false, .own_block = true},
      Routing::full(),
      Routing::full(false),
  };
  std::uint64_t seed = 500;
  for (const Routing& routing : routings) {
    for (const std::int64_t queries : {210, 37}) check_backward(sm90_case(++seed, routing, queries));
  }
}

TEST_F(CudaSm90Backward, BlockSelectedByEveryRowMatchesTheReference) {
  Case c{.seed = 3, .dtype = DType::f16, .heads_per_kv = 8, .head_dim = 64};
  c.sequences = {{0, 20, 580}, {0, 20, 580}};
  c.routing = {.block_size = 16, .top_k = 2, .sink_blocks = 1};
  fill(c);
  check_backward(c);
}

TEST_F(CudaSm90Backward, AnyOrderAndAnyWorkspaceGiveTheSameBits) {
  Case c{.seed = 11, .dtype = DType::bf16, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 128};
  c.sequences = {{0, 5, 5, 90}, {0, 9, 20, 110}};
  c.routing = {.block_size = 40, .top_k = 2};
  fill(c);
  Backpropagation b(c);
  Profile roomy;
  const Differentiated expected = backward(b, {.profile = &roomy});
  EXPECT_TRUE(backward(b) == expected);
  EXPECT_TRUE(backward(b, {.workspace_bytes = roomy.workspace_bytes * 2 / 3}) == expected);
}

TEST_F(CudaSm90Backward, LargeLogitsGiveWeightsOfAtMostOne) {
  check_large_logits(64);
}

TEST_F(CudaSm90Backward, NonFiniteInputsReachOnlyGradientsThatDependOnThem) {
  check_non_finite_backward(128, {.block_size = 100, .top_k = 2});
  for (const Routing& routing :
       {Routing::full(), Routing{.block_size = 32, .top_k = 3}, Routing{.block_size = 7, .top_k = 2}})
    check_non_finite_backward(64, routing);
}

/// The TMA box of a block also loads the keys after its last one, which must not affect results.
TEST_F(CudaSm90Backward, NonFiniteNeighbourSequencesDoNotLeak) {
  Case c{.seed = 5, .dtype = DType::bf16, .head_dim = 64, .routing = {.block_size = 50, .top_k = 2}};
  c.sequences = {{0, 40, 80}, {0, 75, 150}};
  fill(c);
  Backpropagation b(c);
  const Differentiated expected = backward(b);
  for (std::int64_t token = 75; token < 150; ++token) {
    for (std::int64_t d = 0; d < 64; ++d) {
      b.c.k.set(token, 0, d, std::numeric_limits<float>::quiet_NaN());
      b.c.v.set(token, 0, d, std::numeric_limits<float>::quiet_NaN());
    }
  }
  const Differentiated found = backward(b);
  const auto is_same = [&](const Array& one, const Array& other, std::int64_t tokens) {
    for (std::int64_t token = 0; token < tokens; ++token) {
      for (std::int64_t d = 0; d < 64; ++d) EXPECT_EQ(one.get(token, 0, d), other.get(token, 0, d)) << token;
    }
  };
  is_same(found.dq, expected.dq, 40);
  is_same(found.dk, expected.dk, 75);
  is_same(found.dv, expected.dv, 75);
}

TEST_F(CudaSm90Backward, UnselectedKeysHaveZeroGradient) {
  Case c{.seed = 5, .dtype = DType::bf16, .head_dim = 64, .routing = {.block_size = 70, .top_k = 2}};
  c.sequences = {{0, 0, 0}, {0, 7, 130}};
  fill(c);
  Backpropagation b(c);
  const Differentiated d = backward(b);
  EXPECT_EQ(largest(d.dk), 0);
  EXPECT_EQ(largest(d.dv), 0);
}

#ifdef MOBA_CUDA_EMULATION
TEST_F(CudaSm90Backward, UsesSm90WhereTheForwardDoes) {
  const auto launches = [](const char* choice, std::int64_t block_size) {
    choose(choice);
    Backpropagation b(sm90_case(1, {.block_size = block_size, .top_k = 2}, 10));
    const auto count = [] {
      return cuda::emulation::launches("attend_backward_dkv_sm90") +
             cuda::emulation::launches("attend_backward_dq_sm90");
    };
    const int before = count();
    backward(b);
    return count() - before;
  };
  EXPECT_EQ(launches("", 100), 2);
  EXPECT_EQ(launches("", 64), 0);
  EXPECT_EQ(launches("sm90", 64), 2);
  EXPECT_EQ(launches("sm80", 100), 0);
}
#endif

}  // namespace
}  // namespace moba::test
