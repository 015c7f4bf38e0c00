// Attention and decode through the pages of a serving engine, against the oracle and against contiguous keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backends.h"
#include "moba/cache.h"
#include "number.h"
#include "oracle.h"

namespace moba::test {
namespace {

using PagedAttention = EveryBackend;

/// Keys and values of a case in shuffled pages, in one tensor [pages, Hkv, 2 x page_tokens, D]: rows of keys,
/// then of values. All else is NaN.
class Pages {
 public:
  Pages(const Case& c, std::int64_t page_tokens, const std::vector<std::int32_t>& padding = {})
      : case_(c), page_tokens_(page_tokens) {
    const std::vector<std::int32_t>& offsets = c.sequences.cu_seqlens_k;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      starts.push_back(padding.empty() ? 0 : padding[s]);
      lengths.push_back(starts.back() + offsets[s + 1] - offsets[s]);
    }
    const auto sequences = static_cast<std::int64_t>(lengths.size());
    const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    const std::int64_t stride = (longest + page_tokens - 1) / page_tokens + 1;
    pages_ = sequences * stride + 2;
    means_ = std::max<std::int64_t>(page_tokens / c.routing.block_size, 1);
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages_));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(c.seed));
    for (std::int64_t s = 0; s < sequences; ++s) {
      for (std::int64_t i = 0; i < stride; ++i) {
        const bool is_used = i * page_tokens < lengths[static_cast<std::size_t>(s)];
        table.push_back(is_used ? order[static_cast<std::size_t>(s * stride + i)]
                                : std::numeric_limits<std::int32_t>::max());
      }
    }
    rows_.assign(
        static_cast<std::size_t>(pages_ * c.kv_heads * 2 * page_tokens * c.head_dim) * size_of(c.dtype),
        std::byte{0xFF});
    means.assign(static_cast<std::size_t>(pages_ * means_ * c.kv_heads * c.head_dim),
                 std::numeric_limits<float>::quiet_NaN());
    cache = {.k = view_of(0),
             .v = view_of(page_tokens),
             .means = view(means.data(), {pages_, means_, c.kv_heads, c.head_dim}),
             .page_table = table.data(),
             .table_stride = stride,
             .lengths = lengths.data(),
             .starts = padding.empty() ? nullptr : starts.data(),
             .sequences = sequences,
             .max_seqlen_k = longest};
    for (std::int64_t s = 0; s < sequences; ++s) {
      const std::int64_t first = offsets[static_cast<std::size_t>(s)];
      for (std::int64_t token = first; token < offsets[static_cast<std::size_t>(s) + 1]; ++token)
        write(s, starts[static_cast<std::size_t>(s)] + token - first, token);
    }
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  /// Writes key and value `from` of the case as a token of a sequence.
  void write(std::int64_t sequence, std::int64_t token, std::int64_t from) {
    const std::int64_t page =
        table[static_cast<std::size_t>(sequence * cache.table_stride + token / page_tokens_)];
    for (const auto& [pages, array] : {std::pair{&cache.k, &case_.k}, std::pair{&cache.v, &case_.v}}) {
      const auto& at = pages->strides;
      for (std::int64_t head = 0; head < case_.kv_heads; ++head) {
        for (std::int64_t d = 0; d < case_.head_dim; ++d)
          store(pages->data, case_.dtype, page * at[0] + token % page_tokens_ * at[1] + head * at[2] + d,
                array->get(from, head, d));
      }
    }
  }

  std::vector<std::int32_t> lengths{}, starts{}, table{};
  std::vector<float> means{};
  PagedCache cache{};

 private:
  Tensor view_of(std::int64_t first_row) {
    const std::int64_t d = case_.head_dim, head = 2 * page_tokens_ * d;
    Tensor t{.data = rows_.data() + static_cast<std::size_t>(first_row * d) * size_of(case_.dtype),
             .dtype = case_.dtype,
             .rank = 4,
             .sizes = {pages_, page_tokens_, case_.kv_heads, d},
             .strides = {}};
    t.strides = {case_.kv_heads * head, d, head, 1};
    return t;
  }

  const Case& case_;
  std::int64_t page_tokens_, pages_ = 0, means_ = 0;
  std::vector<std::byte> rows_{};
};

/// Ragged: no query, a decoded token, a chunk of a prompt, a whole prompt, nothing at all, queries alone.
Case mixed_case(DType dtype, const Routing& routing) {
  Case c{.seed = 5, .dtype = dtype, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 20};
  c.sequences = {{0, 0, 1, 34, 93, 93, 95}, {0, 17, 101, 200, 259, 259, 260}};
  c.routing = routing;
  fill(c);
  return c;
}

std::vector<Routing> routings() {
  return {{.block_size = 8, .top_k = 3},
          {.block_size = 8, .top_k = 4, .sink_blocks = 1},
          {.block_size = 16, .top_k = 1},
          {.block_size = 8, .top_k = Routing::kEverything},
          {.block_size = 8, .top_k = 3, .scale = -0.7F}};
}

Result attend(const Case& c, const Pages& pages, const Execution& execution) {
  Result result(c);
  attention(c.q.view(), c.sequences.cu_seqlens_q.data(), pages.cache, c.routing, result.outputs(), execution);
  EXPECT_TRUE(result.fences_untouched());
  return result;
}

void update(const Case& c, const Pages& pages, const Execution& execution) {
  update_means(pages.cache, c.routing.block_size, nullptr, pages.cache.max_seqlen_k, execution);
}

TEST_P(PagedAttention, MixedBatchesGiveTheBitsOfContiguousKeys) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Routing& routing : routings()) {
      const Case c = mixed_case(dtype, routing);
      const Result expected = run_attention(c, execution());
      for (const std::int64_t page_tokens : {1, 4, 8, 16, 128}) {
        const Pages pages(c, page_tokens);
        update(c, pages, execution());
        const Result found = attend(c, pages, execution());
        check_result(c, found, exact());
        ASSERT_TRUE(found == expected) << describe(c) << ", pages of " << page_tokens;
      }
    }
  }
}

/// Returns the case of the last token of every sequence, which must have one.
Case last_tokens(const Case& c) {
  Case last = c;
  const auto sequences = static_cast<std::int32_t>(c.sequences.cu_seqlens_k.size()) - 1;
  last.sequences.cu_seqlens_q.clear();
  for (std::int32_t s = 0; s <= sequences; ++s) last.sequences.cu_seqlens_q.push_back(s);
  last.q = Array(c.dtype, sequences, c.q_heads(), c.head_dim);
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      for (std::int64_t d = 0; d < c.head_dim; ++d) last.q.set(s, head, d, c.q.get(s, head, d));
    }
  }
  return last;
}

TEST_P(PagedAttention, DecodeMatchesTheOracle) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Routing& routing : routings()) {
      const Case c = last_tokens(mixed_case(dtype, routing));
      for (const std::int64_t page_tokens : {1, 4, 16, 128}) {
        const Pages pages(c, page_tokens);
        update(c, pages, execution());
        Result decoded(c);
        decode(c.q.view(), pages.cache, c.routing, {.out = decoded.out.view(), .lse = decoded.outputs().lse},
               execution());
        decoded.selection = attend(c, pages, execution()).selection;
        EXPECT_TRUE(decoded.fences_untouched());
        check_attended(c, decoded, exact());
        ASSERT_FALSE(HasFailure()) << describe(c) << ", pages of " << page_tokens;
      }
    }
  }
}

/// Padding shifts the keys in their pages and leaves all results as they are; in pages, and with one page for
/// each sequence, whose means are read where they lie.
TEST_P(PagedAttention, PaddingIsNotSeen) {
  const std::vector<std::int32_t> padding{3, 0, 21, 8, 5, 1};
  for (const Routing& routing : routings()) {
    const Case c = mixed_case(DType::f32, routing);
    const Result expected = run_attention(c, execution());
    for (const std::int64_t page_tokens : {4, 16, 200}) {
      const Pages pages(c, page_tokens, padding);
      update(c, pages, execution());
      Result found(c);  // without a selection, whose width counts the padding
      attention(c.q.view(), c.sequences.cu_seqlens_q.data(), pages.cache, routing,
                {.out = found.out.view(), .lse = found.outputs().lse}, execution());
      found.selection = expected.selection;
      ASSERT_TRUE(found == expected) << "pages of " << page_tokens;
    }
  }
}

/// A mean lies where its block ends, so a prefix of pages that ends within a block may be shared.
TEST_P(PagedAttention, SequencesMayShareAPartOfABlock) {
  Case c = mixed_case(DType::f32, {.block_size = 16, .top_k = 2});
  c.sequences = {{0, 40, 80}, {0, 100, 200}};
  fill(c);
  constexpr std::int64_t kShared = 24;  // tokens: one block and a half, six pages
  for (std::int64_t token = 0; token < kShared; ++token) {
    for (std::int64_t head = 0; head < c.kv_heads; ++head) {
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        c.k.set(100 + token, head, d, c.k.get(token, head, d));
        c.v.set(100 + token, head, d, c.v.get(token, head, d));
      }
    }
  }
  Pages pages(c, 4);
  std::copy_n(pages.table.begin(), kShared / 4, pages.table.begin() + pages.cache.table_stride);
  update(c, pages, execution());
  EXPECT_TRUE(attend(c, pages, execution()) == run_attention(c, execution()));
}

TEST_P(PagedAttention, MeansOfStepsAreThoseOfOneCall) {
  const Case c = mixed_case(DType::bf16, {.block_size = 8, .top_k = 3});
  const std::vector<std::int32_t> padding{3, 0, 21, 8, 5, 1};
  const Pages whole(c, 4, padding);
  update(c, whole, execution());
  const Pages grown(c, 4, padding);
  std::vector<std::int32_t> lengths = grown.starts, before;
  PagedCache cache = grown.cache;
  cache.lengths = lengths.data();
  for (const std::int32_t step : {5, 3, 1, 7, 60, 60}) {
    before = lengths;
    for (std::size_t s = 0; s < lengths.size(); ++s)
      lengths[s] = std::min(lengths[s] + step, grown.lengths[s]);
    update_means(cache, 8, before.data(), step, execution());
  }
  ASSERT_EQ(lengths, grown.lengths);
  EXPECT_TRUE(std::equal(whole.means.begin(), whole.means.end(), grown.means.begin(),
                         [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }));
}

TEST_P(PagedAttention, AnyThreadsGiveTheSameBits) {
  Case c = mixed_case(DType::f32, {.block_size = 1, .top_k = 9});
  c.sequences = {{0, 60, 61}, {0, 900, 1500}};
  fill(c);
  const Result expected = run_attention(c, execution());
  for (const Parallel& parallel : {serial(), openmp(3), std_threads(4)}) {
    const Pages pages(c, 4);
    const Execution settings{.backend = GetParam(), .parallel = parallel};
    update(c, pages, settings);
    EXPECT_TRUE(attend(c, pages, settings) == expected);
  }
}

TEST_P(PagedAttention, MeansMayBeEmptyWithoutSelection) {
  for (const Routing& routing : {Routing{.block_size = 12, .top_k = 1}, Routing::full()}) {
    const Case c = mixed_case(DType::f32, routing);
    Pages pages(c, 5);
    pages.cache.means = {};
    EXPECT_TRUE(attend(c, pages, execution()) == run_attention(c, execution()));
  }
}

MOBA_FOR_EVERY_BACKEND(PagedAttention);

TEST(PagedCacheChecks, InvalidArgumentsThrow) {
  const Case c = mixed_case(DType::f32, {.block_size = 8, .top_k = 2});
  const auto error = [&](auto&& change, const Routing& routing = {.block_size = 8, .top_k = 2}) {
    Pages pages(c, 4);
    std::vector<std::int32_t> offsets = c.sequences.cu_seqlens_q;
    change(pages, offsets);
    Result result(c);
    try {
      attention(c.q.view(), offsets.data(), pages.cache, routing, {.out = result.out.view()});
    } catch (const Error& thrown) {
      return std::string(thrown.what());
    }
    return std::string("none");
  };
  using Offsets = std::vector<std::int32_t>;
  EXPECT_EQ(error([](Pages&, Offsets&) {}), "none");
  EXPECT_EQ(error([](Pages& p, Offsets&) { p.table[26 + 2] = 158; }),
            "attention: cache.page_table: expected 0 to 157 (the pages of cache.k), got 158 at page 2 of "
            "sequence 1");
  EXPECT_EQ(error([](Pages& p, Offsets&) { p.table[0] = -1; }),
            "attention: cache.page_table: expected 0 to 157 (the pages of cache.k), got -1 at page 0 of "
            "sequence 0");
  EXPECT_EQ(error([](Pages& p, Offsets&) { p.lengths[1] = 105; }),
            "attention: cache.lengths: expected 0 to 99 (max_seqlen_k), got 105 in sequence 1");
  EXPECT_EQ(error([](Pages& p, Offsets&) {
              p.starts[1] = 90;
              p.cache.starts = p.starts.data();
            }),
            "attention: cache.starts: expected 0 to 84 (the length), got 90 in sequence 1");
  EXPECT_EQ(error([](Pages&, Offsets& offsets) { offsets[2] = 90; }),
            "attention: cu_seqlens_q: expected never to decrease, got 34 after 90 at entry 3");
  EXPECT_EQ(error([](Pages&, Offsets& offsets) { offsets.back() = 94; }),
            "attention: cu_seqlens_q: expected to end at 95 (the tokens of q), got 94");
  EXPECT_EQ(error([](Pages&, Offsets&) {}, {.block_size = 6, .top_k = 2}),
            "attention: block_size: expected a multiple or a divisor of 4 (the tokens of a page of cache.k), "
            "got 6");
  EXPECT_EQ(error([](Pages& p, Offsets&) { p.cache.means.dtype = DType::bf16; }),
            "attention: cache.means: expected f32 in host memory, got bf16");
  EXPECT_EQ(error([](Pages& p, Offsets&) { p.cache.means.sizes[0] = 3; }),
            "attention: cache.means: expected [158, 1 or more, 2, 20], got [3, 1, 2, 20]");
  EXPECT_EQ(error([](Pages&, Offsets&) {}, {.block_size = 8, .top_k = 2, .causal = false}),
            "attention: causal: expected true (a cache takes causal queries only), got false");
}

TEST(PagedCacheChecks, WeightsThrow) {
  const Case c = mixed_case(DType::f32, {.block_size = 8, .top_k = 2});
  const Pages pages(c, 4);
  Result result(c);
  const KeyWeights weights{};
  EXPECT_THROW(attention(c.q.view(), c.sequences.cu_seqlens_q.data(), pages.cache, c.routing,
                         {.out = result.out.view(), .weights = {&weights, 1}}),
               Error);
}

TEST(PagedCacheChecks, InvalidFormerLengthsThrow) {
  const Case c = mixed_case(DType::f32, {.block_size = 8, .top_k = 2});
  const Pages pages(c, 4);
  const auto error = [&](const std::vector<std::int32_t>& before, std::int64_t max_added) {
    try {
      update_means(pages.cache, 8, before.data(), max_added);
    } catch (const Error& thrown) {
      return std::string(thrown.what());
    }
    return std::string("none");
  };
  EXPECT_EQ(error({17, 80, 99, 59, 0, 1}, 4), "none");
  EXPECT_EQ(error({17, 79, 99, 59, 0, 1}, 4),
            "update_means: before: expected 80 or more (max_added tokens below the length), got 79 in "
            "sequence 1");
  EXPECT_EQ(error({17, 84, 99, 59, 0, -1}, 4),
            "update_means: before: expected 0 or more (max_added tokens below the length), got -1 in "
            "sequence 5");
}

}  // namespace
}  // namespace moba::test
