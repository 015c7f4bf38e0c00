// Decode over pages on the emulated device, against the reference on contiguous keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "device_case.h"
#include "moba/cache.h"

namespace moba::test {
namespace {

struct Shape {
  DType dtype = DType::bf16;
  std::int64_t kv_heads = 1, heads_per_kv = 1, head_dim = 64, page_tokens = 8;
  Values values = Values::normal;
  bool in_order = false;     // page i of sequence s is page s x table_stride + i, without a table
  std::int32_t padding = 0;  // tokens of padding before sequence s, times s mod 3
};

double unit_of(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
}

/// Sequences of given lengths, contiguous and in pages. The pages lie among pages of NaN, shuffled unless
/// `in_order`.
struct Paged {
  Paged(std::uint64_t seed, const Shape& of, const Routing& with, std::vector<std::int32_t> tokens)
      : shape(of), routing(with), lengths(std::move(tokens)) {
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      starts.push_back(shape.padding * static_cast<std::int32_t>(s % 3));
      ends.push_back(starts.back() + lengths[s]);
    }
    const auto longest = std::max<std::int64_t>(*std::max_element(ends.begin(), ends.end()), 1);
    const std::int64_t stride = (longest - 1) / shape.page_tokens + 2;
    pages = static_cast<std::int64_t>(lengths.size()) * stride + 3;
    means_of_page = std::max<std::int64_t>(shape.page_tokens / routing.block_size, 1);
    k = Array(shape.dtype, pages * shape.page_tokens, shape.kv_heads, shape.head_dim);
    v = Array(shape.dtype, pages * shape.page_tokens, shape.kv_heads, shape.head_dim);
    means = Array(shape.dtype, pages * means_of_page, shape.kv_heads, shape.head_dim, Layout::aligned);
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
    if (!shape.in_order) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      Case& c = sequences.emplace_back(Case{.seed = seed + s,
                                            .dtype = shape.dtype,
                                            .kv_heads = shape.kv_heads,
                                            .heads_per_kv = shape.heads_per_kv,
                                            .head_dim = shape.head_dim,
                                            .sequences = one_sequence(1, lengths[s]),
                                            .routing = routing,
                                            .values = shape.values});
      fill(c);
      for (std::int64_t i = 0; i < stride; ++i) {
        const std::int64_t used = (ends[s] + shape.page_tokens - 1) / shape.page_tokens;
        const std::int32_t page = order[s * static_cast<std::size_t>(stride) + static_cast<std::size_t>(i)];
        table.push_back(i < used || shape.in_order ? page : std::numeric_limits<std::int32_t>::max());
      }
      for (std::int64_t token = 0; token < lengths[s]; ++token) write(s, token, stride);
    }
    cache = {.k = in_pages(k, shape.page_tokens),
             .v = in_pages(v, shape.page_tokens),
             .means = in_pages(means, means_of_page),
             .page_table = shape.in_order ? nullptr : table.data(),
             .table_stride = stride,
             .lengths = ends.data(),
             .starts = shape.padding > 0 ? starts.data() : nullptr,
             .sequences = static_cast<std::int64_t>(lengths.size()),
             .max_seqlen_k = longest};
    q = Array(shape.dtype, cache.sequences, shape.kv_heads * shape.heads_per_kv, shape.head_dim,
              Layout::aligned);
    for (std::int64_t s = 0; s < cache.sequences; ++s) {
      for (std::int64_t head = 0; head < q.heads(); ++head) {
        for (std::int64_t d = 0; d < shape.head_dim; ++d)
          q.set(s, head, d, sequences[static_cast<std::size_t>(s)].q.get(0, head, d));
      }
    }
  }
  Paged(const Paged&) = delete;
  Paged& operator=(const Paged&) = delete;

  /// Row of a block in `means`.
  std::int64_t mean_row(std::size_t sequence, std::int64_t block) const {
    const std::int64_t token = (block + 1) * routing.block_size - 1;
    const std::int64_t page = table[sequence * static_cast<std::size_t>(cache.table_stride) +
                                    static_cast<std::size_t>(token / shape.page_tokens)];
    return page * means_of_page +
           std::min(token % shape.page_tokens / routing.block_size, means_of_page - 1);  // of unread means
  }
  /// Case with the shape of a call's outputs.
  Case result_shape() const {
    return {.dtype = shape.dtype,
            .kv_heads = shape.kv_heads,
            .heads_per_kv = shape.heads_per_kv,
            .head_dim = shape.head_dim,
            .sequences = one_sequence(cache.sequences),
            .routing = routing,
            .out_layout = Layout::aligned};
  }
  Result decode_on_device(const Execution& execution = {}) const {
    Result result(result_shape());
    Outputs outputs = result.outputs();
    outputs.out = on_device(outputs.out);
    outputs.selection = nullptr;
    decode(on_device(q.view()), cache, routing, outputs, execution);
    return result;
  }
  /// Decodes with the reference, given the means that the device has computed.
  Result decode_by_reference() const {
    Result result(result_shape());
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const std::int64_t blocks = lengths[s] / routing.block_size;
      std::vector<float> wide;
      for (std::int64_t block = 0; block < blocks; ++block) {
        for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
          for (std::int64_t d = 0; d < shape.head_dim; ++d)
            wide.push_back(static_cast<float>(means.get(mean_row(s, block), head, d)));
        }
      }
      // One page, as long as the sequence.
      const PagedCache contiguous{.k = one_page(sequences[s].k.view()),
                                  .v = one_page(sequences[s].v.view()),
                                  .means = view(wide.data(), {1, blocks, shape.kv_heads, shape.head_dim}),
                                  .table_stride = 1,
                                  .lengths = &lengths[s],
                                  .sequences = 1,
                                  .max_seqlen_k = lengths[s]};
      std::vector<float> lse(static_cast<std::size_t>(q.heads()));
      const auto row = static_cast<std::int64_t>(s);
      decode(q.slice(row, 1), contiguous, routing, {.out = result.out.slice(row, 1), .lse = lse.data()},
             {.backend = "reference"});
      for (std::int64_t head = 0; head < q.heads(); ++head)
        result.outputs().lse[head * cache.sequences + row] = lse[static_cast<std::size_t>(head)];
    }
    return result;
  }

  Shape shape;
  Routing routing;
  std::vector<std::int32_t> lengths, starts{}, ends{}, table{};
  std::int64_t pages = 0, means_of_page = 1;
  std::vector<Case> sequences;  // one query each
  Array q, k, v, means;
  PagedCache cache;

 private:
  static Tensor one_page(Tensor t) {
    t.rank = 4;
    t.sizes = {1, t.sizes[0], t.sizes[1], t.sizes[2]};
    t.strides = {0, t.strides[0], t.strides[1], 1};
    return t;
  }
  Tensor in_pages(const Array& array, std::int64_t rows) const {
    Tensor t = on_device(array.view());
    t.rank = 4;
    t.sizes = {pages, rows, t.sizes[1], t.sizes[2]};
    t.strides = {rows * t.strides[0], t.strides[0], t.strides[1], 1};
    return t;
  }
  void write(std::size_t sequence, std::int64_t token, std::int64_t stride) {
    const std::int64_t page = table[sequence * static_cast<std::size_t>(stride) +
                                    static_cast<std::size_t>((starts[sequence] + token) / shape.page_tokens)];
    const std::int64_t to = page * shape.page_tokens + (starts[sequence] + token) % shape.page_tokens;
    for (std::int64_t head = 0; head < shape.kv_heads; ++head) {
      for (std::int64_t d = 0; d < shape.head_dim; ++d) {
        k.set(to, head, d, sequences[sequence].k.get(token, head, d));
        v.set(to, head, d, sequences[sequence].v.get(token, head, d));
      }
    }
  }
};

void check_means(const Paged& p) {
  for (std::size_t s = 0; s < p.sequences.size(); ++s) {
    const std::int64_t size = p.routing.block_size;
    for (std::int64_t block = 0; block < p.lengths[s] / size; ++block) {
      for (std::int64_t head = 0; head < p.shape.kv_heads; ++head) {
        for (std::int64_t d = 0; d < p.shape.head_dim; ++d) {
          double sum = 0;
          for (std::int64_t i = 0; i < size; ++i) sum += p.sequences[s].k.get(block * size + i, head, d);
          const double mean = sum / static_cast<double>(size);
          ASSERT_NEAR(p.means.get(p.mean_row(s, block), head, d), mean,
                      unit_of(p.shape.dtype) * std::fabs(mean) + 1e-6)
              << "sequence " << s << ", block " << block;
        }
      }
    }
  }
}

/// Decodes with the means as they are.
void check_outputs(const Paged& p) {
  SCOPED_TRACE(describe(p.sequences.front()) + ", pages of " + std::to_string(p.shape.page_tokens));
  const Result found = p.decode_on_device(), expected = p.decode_by_reference();
  EXPECT_TRUE(found.fences_untouched()) << "wrote outside its outputs";
  const double unit = unit_of(p.shape.dtype);
  double allowed = 0;  // for rounded weights
  for (const Case& c : p.sequences) allowed = std::max(allowed, unit * largest(c.v));
  for (std::int64_t s = 0; s < p.cache.sequences; ++s) {
    for (std::int64_t head = 0; head < p.q.heads(); ++head) {
      const double lse = expected.lse_at(head, s);
      if (std::isinf(lse)) {
        ASSERT_EQ(found.lse_at(head, s), lse);
      } else {
        ASSERT_NEAR(found.lse_at(head, s), lse, 1e-4 + 1e-6 * std::fabs(lse))
            << "head " << head << ", sequence " << s;
      }
      for (std::int64_t d = 0; d < p.shape.head_dim; ++d) {
        const double out = expected.out.get(s, head, d);
        ASSERT_NEAR(found.out.get(s, head, d), out, allowed + 2 * unit * std::fabs(out))
            << "head " << head << ", sequence " << s << ", element " << d;
      }
    }
  }
}

void check_decode(const Paged& p) {
  if (p.routing.top_k != Routing::kEverything) {
    update_means(p.cache, p.routing.block_size, nullptr, p.cache.max_seqlen_k);
    check_means(p);
  }
  EXPECT_TRUE(p.means.gaps_untouched());
  check_outputs(p);
}

TEST(CudaDecode, MatchesTheReference) {
  constexpr auto kEverything = Routing::kEverything;
  const std::vector<std::pair<Shape, Routing>> cases = {
      {{.heads_per_kv = 1, .page_tokens = 8}, {.block_size = 8, .top_k = 3}},
      {{.dtype = DType::f16, .kv_heads = 2, .heads_per_kv = 3, .page_tokens = 4},
       {.block_size = 8, .top_k = 4}},
      {{.heads_per_kv = 8, .page_tokens = 16}, {.block_size = 32, .top_k = 2, .sink_blocks = 1}},
      {{.dtype = DType::f16, .heads_per_kv = 20, .page_tokens = 1}, {.block_size = 1, .top_k = 30}},
      {{.heads_per_kv = 2, .head_dim = 96, .page_tokens = 5},
       {.block_size = 5, .top_k = 6, .sink_blocks = 3}},
      {{.kv_heads = 2, .heads_per_kv = 4, .head_dim = 128, .page_tokens = 10},
       {.block_size = 20, .top_k = 3}},
      {{.dtype = DType::f16, .head_dim = 256, .page_tokens = 16}, {.block_size = 16, .top_k = 3}},
      {{.heads_per_kv = 3, .page_tokens = 7}, {.block_size = 21, .top_k = 1}},
      {{.heads_per_kv = 3, .page_tokens = 7}, {.block_size = 5, .top_k = kEverything}},
      {{.heads_per_kv = 2, .page_tokens = 4, .values = Values::equal}, {.block_size = 4, .top_k = 5}},
      {{.heads_per_kv = 2, .page_tokens = 4, .values = Values::integers}, {.block_size = 4, .top_k = 5}},
      {{.heads_per_kv = 2, .page_tokens = 4}, {.block_size = 4, .top_k = 5, .scale = -0.3F}},
      {{.heads_per_kv = 2, .page_tokens = 4}, {.block_size = 4, .top_k = 3, .scale = 0.0F}},
      {{.kv_heads = 2, .heads_per_kv = 2, .page_tokens = 24}, {.block_size = 8, .top_k = 3}},
      {{.heads_per_kv = 2, .page_tokens = 4, .padding = 3}, {.block_size = 8, .top_k = 3, .sink_blocks = 1}},
      {{.heads_per_kv = 2, .page_tokens = 4, .in_order = true}, {.block_size = 4, .top_k = 4}},
      // One page per sequence, as in a cache that is one tensor.
      {{.kv_heads = 2, .heads_per_kv = 2, .page_tokens = 90, .in_order = true, .padding = 5},
       {.block_size = 7, .top_k = 3}},
      {{.heads_per_kv = 3, .page_tokens = 90, .in_order = true, .padding = 5},
       {.block_size = 7, .top_k = kEverything}},
  };
  std::uint64_t seed = 40;
  for (const auto& [shape, routing] : cases) {
    if (HasFailure()) return;
    check_decode(Paged(seed += 10, shape, routing, {73, 0, 1, 40, 21, 8}));
  }
}

/// Covers blocks of several splits, candidates of several chunks, and full attention over a long sequence.
TEST(CudaDecode, LongSequencesMatchTheReference) {
  check_decode(
      Paged(1, {.heads_per_kv = 2, .page_tokens = 50}, {.block_size = 350, .top_k = 2}, {1210, 300}));
  check_decode(Paged(2, {.heads_per_kv = 2, .page_tokens = 2}, {.block_size = 2, .top_k = 9}, {1210, 300}));
  check_decode(Paged(3, {.heads_per_kv = 5, .page_tokens = 50}, Routing::full(), {1210, 300}));
}

/// Selections longer than a group, than the orders that a warp holds, and than the candidates.
TEST(CudaDecode, LongSelectionsMatchTheReference) {
  const std::vector<std::int32_t> lengths{700, 0, 17, 130, 1};
  for (const std::int64_t top_k : {16, 17, 33, 100, 690}) {
    check_decode(
        Paged(20, {.heads_per_kv = 3, .page_tokens = 16}, {.block_size = 1, .top_k = top_k}, lengths));
    check_decode(Paged(21, {.kv_heads = 2, .page_tokens = 4, .values = Values::integers},
                       {.block_size = 2, .top_k = top_k, .sink_blocks = 3}, lengths));
  }
}

/// More groups of candidates than a warp holds at a time.
TEST(CudaDecode, ManyCandidatesMatchTheReference) {
  for (const Values values : {Values::normal, Values::equal}) {
    check_decode(
        Paged(22, {.page_tokens = 500, .values = values}, {.block_size = 1, .top_k = 6}, {8400, 33}));
  }
}

/// All scores are equal, within and across the chunks that are scored apart: the last blocks are selected.
TEST(CudaDecode, OfEqualScoresTheLastBlocksAreSelected) {
  for (const std::int64_t top_k : {2, 5, 16, 40}) {
    const Paged p(23, {.heads_per_kv = 2, .page_tokens = 4, .values = Values::equal},
                  {.block_size = 1, .top_k = top_k}, {600, 90});
    check_decode(p);
    const Result found = p.decode_on_device();
    for (std::int64_t d = 0; d < 64; ++d) {
      double mean = 0;  // all weights are equal
      for (std::int64_t i = 0; i < top_k; ++i)
        mean += p.sequences[0].v.get(599 - i, 0, d) / static_cast<double>(top_k);
      ASSERT_NEAR(found.out.get(0, 1, d), mean, 0.05);
    }
  }
}

/// NaN sorts as -inf, in every position of a group and in groups without any number.
TEST(CudaDecode, NonFiniteScoresMatchTheReference) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const std::int64_t top_k : {3, 20, 190}) {
    Paged p(24, {.heads_per_kv = 2, .page_tokens = 4}, {.block_size = 2, .top_k = top_k, .sink_blocks = 1},
            {400, 60});
    update_means(p.cache, 2, nullptr, 400);
    for (std::int64_t block = 0; block < 199; ++block) {
      const bool in_group_of_nan = block / 16 % 3 == 1;
      if (in_group_of_nan || block % 5 == 0) p.means.set(p.mean_row(0, block), 0, block % 64, kNan);
      if (block % 7 == 0) p.means.set(p.mean_row(0, block), 0, 5, block % 2 == 0 ? kInfinity : -kInfinity);
    }
    check_outputs(p);
  }
}

TEST(CudaDecode, MeansMayBeEmptyWithoutSelection) {
  for (const Routing& routing : {Routing{.block_size = 12, .top_k = 1}, Routing::full()}) {
    Paged p(4, {.heads_per_kv = 2, .page_tokens = 5}, routing, {50, 30});
    const Result expected = p.decode_on_device();
    p.cache.means = {};
    EXPECT_TRUE(p.decode_on_device() == expected);
  }
}

/// Torch's tensors without elements have no address.
TEST(CudaDecode, PagesWithoutTokensMayBeNull) {
  const Case c{.dtype = DType::bf16, .head_dim = 64, .sequences = one_sequence(3)};
  Array q(DType::bf16, 3, 1, 64);
  Result result(c);
  Tensor pages{.dtype = DType::bf16, .device = Device::cuda, .rank = 4, .sizes = {3, 0, 1, 64}};
  pages.strides = {64, 64, 64, 1};
  const std::vector<std::int32_t> lengths(3);
  const PagedCache cache{
      .k = pages, .v = pages, .means = pages, .table_stride = 1, .lengths = lengths.data(), .sequences = 3};
  for (const Routing& routing : {Routing{.block_size = 8, .top_k = 3}, Routing::full()}) {
    decode(on_device(q.view()), cache, routing,
           {.out = on_device(result.out.view()), .lse = result.outputs().lse});
    EXPECT_EQ(largest(result.out), 0);
    for (std::int64_t s = 0; s < 3; ++s)
      EXPECT_EQ(result.lse_at(0, s), -std::numeric_limits<float>::infinity());
  }
}

TEST(CudaDecode, IncrementalMeansMatchTheKeys) {
  const Paged p(9, {.kv_heads = 2, .page_tokens = 4, .padding = 3}, {.block_size = 8, .top_k = 2},
                {40, 7, 64, 9, 0});
  std::vector<std::int32_t> lengths = p.starts, before;
  PagedCache growing = p.cache;
  growing.lengths = lengths.data();
  for (const std::int32_t step : {5, 3, 1, 7, 24, 24}) {
    before = lengths;
    for (std::size_t s = 0; s < lengths.size(); ++s) lengths[s] = std::min(lengths[s] + step, p.ends[s]);
    update_means(growing, 8, before.data(), step);
  }
  ASSERT_EQ(lengths, p.ends);
  check_means(p);
  EXPECT_TRUE(p.means.gaps_untouched());
  check_decode(p);
}

TEST(CudaDecode, AnyOrderAndWorkspaceGiveTheSameBits) {
  const Paged p(5, {.kv_heads = 2, .heads_per_kv = 3, .page_tokens = 8}, {.block_size = 8, .top_k = 4},
                {90, 50, 13});
  update_means(p.cache, 8, nullptr, 90);
  Profile roomy;
  const Result expected = p.decode_on_device({.profile = &roomy});
  EXPECT_TRUE(p.decode_on_device() == expected);
  bool refused = false;
  for (std::size_t budget = roomy.workspace_bytes; budget > 0; budget = budget / 2) {
    try {
      EXPECT_TRUE(p.decode_on_device({.workspace_bytes = budget}) == expected) << budget;
      EXPECT_FALSE(refused);
    } catch (const Error& error) {
      refused = true;
      EXPECT_NE(std::string(error.what()).find("workspace_bytes"), std::string::npos) << error.what();
    }
  }
  EXPECT_TRUE(refused);
}

/// A query of NaN selects the sinks and the most recent blocks, as in all backends.
TEST(CudaDecode, NanQueryAffectsOnlyItsRow) {
  Paged p(6, {.heads_per_kv = 2, .page_tokens = 4}, {.block_size = 4, .top_k = 3, .sink_blocks = 1},
          {50, 30});
  update_means(p.cache, 4, nullptr, 50);
  const Result before = p.decode_on_device();
  p.q.set(0, 1, 7, std::numeric_limits<double>::quiet_NaN());
  const Result found = p.decode_on_device();
  for (std::int64_t d = 0; d < 64; ++d) {
    EXPECT_TRUE(std::isnan(found.out.get(0, 1, d)));
    EXPECT_EQ(found.out.get(0, 0, d), before.out.get(0, 0, d));
    EXPECT_EQ(found.out.get(1, 1, d), before.out.get(1, 1, d));
  }
}

TEST(CudaDecode, InvalidArgumentsThrow) {
  Paged p(7, {.page_tokens = 8}, {.block_size = 8, .top_k = 2}, {50, 30});
  const auto error_of = [&](const PagedCache& cache, const Routing& routing) -> std::string {
    try {
      Result result(p.result_shape());
      decode(on_device(p.q.view()), cache, routing, {.out = on_device(result.out.view())});
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  PagedCache wrong = p.cache;
  wrong.table_stride = 6;
  EXPECT_EQ(error_of(wrong, p.routing),
            "decode: cache.table_stride: expected at least 7 (50 tokens in pages of 8), got 6");
  EXPECT_EQ(
      error_of(p.cache, {.block_size = 12, .top_k = 2}),
      "decode: block_size: expected a multiple or a divisor of 8 (the tokens of a page of cache.k), got 12");
  EXPECT_EQ(error_of(p.cache, {.block_size = 8, .top_k = 2, .causal = false}),
            "decode: causal: expected true (a cache takes causal queries only), got false");
  wrong = p.cache;
  wrong.lengths = nullptr;
  EXPECT_EQ(error_of(wrong, p.routing), "decode: cache.lengths: expected [2] int32, got null");
  wrong = p.cache;
  wrong.page_table = nullptr;
  wrong.sequences = 3;
  EXPECT_EQ(error_of(wrong, p.routing), "decode: cache.k: expected 3 x 8 pages without a page_table, got 19");
  wrong = p.cache;
  wrong.means.sizes[2] = 2;
  EXPECT_EQ(error_of(wrong, p.routing),
            "decode: cache.means: expected [19, 1 or more, 1, 64], got [19, 1, 2, 64]");
  wrong = p.cache;
  wrong.v.strides[0] -= 4;
  EXPECT_EQ(error_of(wrong, p.routing).find("decode: cache.v: expected rows aligned"), 0U);
}

}  // namespace
}  // namespace moba::test
