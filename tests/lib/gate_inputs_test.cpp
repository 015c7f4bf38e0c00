// Gates whose inputs are the caller's, and the features of blocks that such gates read.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "backends.h"
#include "moba/cache.h"
#include "oracle.h"

namespace moba::test {
namespace {

using GateOfCaller = EveryBackend;

std::int64_t blocks_of(std::int64_t keys, std::int64_t block_size) {
  return keys / block_size + (keys % block_size == 0 ? 0 : 1);
}

/// Blocks of all sequences; the complete ones alone, if asked.
std::int64_t count_blocks(const Case& c, bool complete = false) {
  std::int64_t count = 0;
  for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_k.size(); ++s) {
    const std::int64_t keys = c.sequences.cu_seqlens_k[s + 1] - c.sequences.cu_seqlens_k[s];
    count += complete ? keys / c.routing.block_size : blocks_of(keys, c.routing.block_size);
  }
  return count;
}

std::vector<std::int32_t> select_with(const Case& c, const GateInputs& gate, std::int64_t heads,
                                      const Execution& execution) {
  const std::int64_t width = selection_width(c.sequences, c.routing);
  std::vector<std::int32_t> selection(static_cast<std::size_t>(heads * c.queries() * width + 1), -77);
  select_blocks(gate, c.sequences, c.routing, selection.data(), execution);
  EXPECT_EQ(selection.back(), -77) << "wrote past the end";
  return selection;
}

/// The features of a case's keys.
struct Features {
  Array mean, max, min;

  Features(const Case& c, DType dtype, const Execution& execution)
      : mean(dtype, count_blocks(c), c.kv_heads, c.head_dim, Layout::padded),
        max(dtype, count_blocks(c), c.kv_heads, c.head_dim),
        min(dtype, count_blocks(c), c.kv_heads, c.head_dim) {
    block_features(c.k.view(), c.sequences.cu_seqlens_k, c.routing.block_size,
                   {.mean = mean.view(), .max = max.view(), .min = min.view()}, execution);
  }
};

TEST_P(GateOfCaller, MeansOfKeysGiveTheBitsOfMoba) {
  for (std::uint64_t seed = 9000; seed < 9200 && !HasFailure(); ++seed) {
    const Case c = random_case(seed);
    const std::int64_t width = selection_width(c.sequences, c.routing);
    std::vector<std::int32_t> expected(static_cast<std::size_t>(c.q_heads() * c.queries() * width + 1), -77);
    select_blocks(c.q.view(), c.k.view(), c.sequences, c.routing, expected.data(), execution());
    for (const DType dtype : {DType::f32, c.dtype}) {
      const Features features(c, dtype, execution());
      EXPECT_TRUE(features.mean.gaps_untouched());
      EXPECT_EQ(select_with(c, {c.q.view(), features.mean.view()}, c.q_heads(), execution()), expected)
          << describe(c);
    }
    // Without the incomplete blocks, which causal calls do not read.
    if (!c.routing.causal) continue;
    Array complete(DType::f32, count_blocks(c, true), c.kv_heads, c.head_dim);
    const Features features(c, DType::f32, execution());
    std::int64_t from = 0, to = 0;
    for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_k.size(); ++s) {
      const std::int64_t keys = c.sequences.cu_seqlens_k[s + 1] - c.sequences.cu_seqlens_k[s];
      for (std::int64_t block = 0; block < keys / c.routing.block_size; ++block, ++to) {
        for (std::int64_t head = 0; head < c.kv_heads; ++head) {
          for (std::int64_t d = 0; d < c.head_dim; ++d)
            complete.set(to, head, d, features.mean.get(from + block, head, d));
        }
      }
      from += blocks_of(keys, c.routing.block_size);
    }
    EXPECT_EQ(select_with(c, {c.q.view(), complete.view()}, c.q_heads(), execution()), expected)
        << describe(c);
  }
}

/// Small integers, so that scores are exact and often equal; a few are NaN.
Array gate_tensor(DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t head_dim,
                  std::mt19937_64& engine) {
  Array array(dtype, rows, heads, head_dim, Layout::padded);
  std::uniform_int_distribution<int> value(-2, 2), rare(0, 400);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t head = 0; head < heads; ++head) {
      for (std::int64_t d = 0; d < head_dim; ++d)
        array.set(row, head, d, rare(engine) == 0 ? std::numeric_limits<double>::quiet_NaN() : value(engine));
    }
  }
  return array;
}

/// The rules of docs/mathematics.md for one row, in exact arithmetic.
std::vector<std::int32_t> expected_row(const Routing& r, std::int64_t own, std::int64_t blocks,
                                       const std::vector<double>& scores) {
  std::vector<std::int32_t> candidates(
      static_cast<std::size_t>(r.causal ? std::max<std::int64_t>(own, 0) : blocks));
  std::iota(candidates.begin(), candidates.end(), 0);
  const auto forced = [&](std::int32_t block) {
    return r.own_block && block == own ? 2 : block < r.sink_blocks ? 1 : 0;
  };
  const auto score = [&](std::int32_t block) {
    const double s = scores[static_cast<std::size_t>(block)];
    return std::isnan(s) ? -std::numeric_limits<double>::infinity() : s;
  };
  std::sort(candidates.begin(), candidates.end(), [&](std::int32_t a, std::int32_t b) {
    if (forced(a) != forced(b)) return forced(a) > forced(b);
    return score(a) != score(b) ? score(a) > score(b) : a > b;
  });
  candidates.resize(static_cast<std::size_t>(std::min(std::ssize(candidates), r.top_k - (r.causal ? 1 : 0))));
  if (r.causal && own >= 0) candidates.push_back(static_cast<std::int32_t>(own));
  std::sort(candidates.begin(), candidates.end());
  return candidates;
}

TEST_P(GateOfCaller, AnyInputsSelectTheHighestScores) {
  std::mt19937_64 engine(3);
  for (std::uint64_t seed = 9300; seed < 9420 && !HasFailure(); ++seed) {
    Case c = random_case(seed);
    c.routing.block_size = std::min<std::int64_t>(c.routing.block_size, 8);
    c.head_dim = std::array{1, 32, 64, 100, 128, 256}[seed % 6];
    const std::int64_t heads = c.q_heads(), k_heads = seed % 4 == 0 ? heads : c.kv_heads;
    const DType k_dtype = seed % 2 == 0 ? DType::f32 : c.dtype;
    const Array q = gate_tensor(c.dtype, c.queries(), heads, c.head_dim, engine),
                k = gate_tensor(k_dtype, count_blocks(c), k_heads, c.head_dim, engine);
    const std::vector<std::int32_t> found = select_with(c, {q.view(), k.view()}, heads, execution());
    const std::int64_t width = selection_width(c.sequences, c.routing);
    std::int64_t first_block = 0;
    for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_q.size(); ++s) {
      const std::int64_t q0 = c.sequences.cu_seqlens_q[s], q1 = c.sequences.cu_seqlens_q[s + 1];
      const std::int64_t keys = c.sequences.cu_seqlens_k[s + 1] - c.sequences.cu_seqlens_k[s];
      const std::int64_t blocks = blocks_of(keys, c.routing.block_size);
      for (std::int64_t token = q0; token < q1; ++token) {
        const std::int64_t position = token - q1 + keys;
        const std::int64_t own = position < 0 ? -1 : position / c.routing.block_size;
        for (std::int64_t head = 0; head < heads; ++head) {
          std::vector<double> scores(static_cast<std::size_t>(blocks));
          for (std::int64_t block = 0; block < blocks; ++block) {
            for (std::int64_t d = 0; d < c.head_dim; ++d)
              scores[static_cast<std::size_t>(block)] +=
                  q.get(token, head, d) * k.get(first_block + block, head / (heads / k_heads), d);
          }
          const auto begin = found.begin() + (head * c.queries() + token) * width;
          const std::vector<std::int32_t> row(begin, std::find(begin, begin + width, -1));
          ASSERT_EQ(row, expected_row(c.routing, own, blocks, scores))
              << describe(c) << "\nhead " << head << ", token " << token;
        }
      }
      first_block += blocks;
    }
  }
}

TEST_P(GateOfCaller, FeaturesMatchTheirDefinition) {
  for (std::uint64_t seed = 9500; seed < 9560 && !HasFailure(); ++seed) {
    const Case c = random_case(seed);
    const Features features(c, c.dtype, execution());
    std::int64_t row = 0;
    for (std::size_t s = 0; s + 1 < c.sequences.cu_seqlens_k.size(); ++s) {
      const std::int64_t begin = c.sequences.cu_seqlens_k[s], end = c.sequences.cu_seqlens_k[s + 1];
      for (std::int64_t first = begin; first < end; first += c.routing.block_size, ++row) {
        const std::int64_t last = std::min(first + c.routing.block_size, end);
        for (std::int64_t head = 0; head < c.kv_heads; ++head) {
          for (std::int64_t d = 0; d < c.head_dim; ++d) {
            double sum = 0, magnitude = 0, max = -HUGE_VAL, min = HUGE_VAL;
            for (std::int64_t key = first; key < last; ++key) {
              const double value = c.k.get(key, head, d);
              sum += value;
              magnitude += std::fabs(value);
              max = std::isnan(value) || std::isnan(max) ? std::nan("") : std::max(max, value);
              min = std::isnan(value) || std::isnan(min) ? std::nan("") : std::min(min, value);
            }
            const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
            ASSERT_TRUE(same(features.max.get(row, head, d), max)) << describe(c);
            ASSERT_TRUE(same(features.min.get(row, head, d), min)) << describe(c);
            const double mean = sum / static_cast<double>(last - first);
            if (!std::isfinite(mean)) continue;
            const double unit = c.dtype == DType::f32 ? 0x1p-24 : c.dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
            ASSERT_NEAR(features.mean.get(row, head, d), mean,
                        0x1p-24 * magnitude + unit * std::fabs(mean) * 1.01 + 0x1p-25)
                << describe(c);
          }
        }
      }
    }
  }
}

TEST_P(GateOfCaller, ACacheKeepsTheFeaturesOfItsBlocks) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Case c = plain_case(4, 1, 83, {.block_size = 8, .top_k = 3});
    c.dtype = dtype;
    c.kv_heads = 2;
    c.head_dim = 20;
    fill(c);
    c.k.set(30, 1, 7, std::nan(""));
    KvCache cache({.kv_heads = 2, .head_dim = 20, .block_size = 8, .dtype = dtype, .extremes = true});
    const auto append_to = [&](std::int64_t end) {
      for (std::int64_t first = cache.length(); first < end;) {
        const std::int64_t count = std::min<std::int64_t>(first % 3 + 1, end - first);
        cache.append(c.k.slice(first, count), c.v.slice(first, count), 0, execution());
        first += count;
      }
    };
    append_to(70);
    cache.truncate(43);
    append_to(83);
    const Features expected(c, DType::f32, execution());
    const BlockFeatures found = cache.features();
    const auto check = [&](const Tensor& kept, const Array& wanted, double tolerance = 0) {
      ASSERT_EQ(kept.sizes, (std::array<std::int64_t, 4>{10, 2, 20, 0}));
      for (std::int64_t block = 0; block < 10; ++block) {
        for (std::int64_t head = 0; head < 2; ++head) {
          for (std::int64_t d = 0; d < 20; ++d) {
            const double a = static_cast<const float*>(kept.data)[(block * 2 + head) * 20 + d],
                         b = wanted.get(block, head, d);
            ASSERT_TRUE(std::fabs(a - b) <= tolerance || (std::isnan(a) && std::isnan(b)))
                << block << " " << head << " " << d;
          }
        }
      }
    };
    // The reference sums in double where it has all keys at once.
    check(found.mean, expected.mean, exact() ? 0x1p-8 : 0);
    check(found.max, expected.max);
    check(found.min, expected.min);
  }
  EXPECT_EQ(KvCache({.kv_heads = 2}).features().max.data, nullptr);
}

TEST_P(GateOfCaller, PagesKeepTheExtremesOfTheirBlocks) {
  Case c = plain_case(5, 1, 45, {.block_size = 8, .top_k = 3});
  const PageLayout layout{.kv_heads = 1, .head_dim = 16, .block_size = 8, .page_tokens = 64};
  std::vector<std::byte> memory(page_bytes(layout) + 64);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::byte* const page = static_cast<std::byte*>(std::align(64, page_bytes(layout), aligned, space));
  std::vector<float> means(6 * 16), max(6 * 16), min(6 * 16);
  PagedSequence sequence{.pages = {&page, 1}, .means = means.data(), .max = max.data(), .min = min.data()};
  for (std::int64_t first = 0; first < 45; first += 5) {
    append(c.k.slice(first, 5), c.v.slice(first, 5), layout, sequence, execution());
    sequence.length += 5;
  }
  const Features expected(c, DType::f32, execution());
  for (std::int64_t block = 0; block < 6; ++block) {  // the last one is incomplete
    for (std::int64_t d = 0; d < 16; ++d) {
      EXPECT_EQ(max[static_cast<std::size_t>(block * 16 + d)], expected.max.get(block, 0, d));
      EXPECT_EQ(min[static_cast<std::size_t>(block * 16 + d)], expected.min.get(block, 0, d));
    }
  }
}

/// Errors of select_blocks for gate inputs of 12 queries on 20 keys in blocks of 4.
TEST_P(GateOfCaller, InvalidInputsThrow) {
  Array q(DType::bf16, 12, 4, 32), k(DType::bf16, 5, 2, 32);
  const Sequences sequences = one_sequence(12, 20);
  const Routing routing{.block_size = 4, .top_k = 2};
  std::vector<std::int32_t> selection(4 * 12 * 2, -77);
  const auto error_of = [&](const GateInputs& gate, const Sequences& s) -> std::string {
    try {
      select_blocks(gate, s, routing, selection.data(), execution());
    } catch (const Error& error) {
      EXPECT_EQ(std::count(selection.begin(), selection.end(), -77), std::ssize(selection));
      return error.what();
    }
    return "";
  };
  const auto k_of = [](DType dtype, std::int64_t rows, std::int64_t heads, std::int64_t head_dim) {
    return Array(dtype, rows, heads, head_dim);
  };
  const auto with = [&](const Array& other) { return error_of({q.view(), other.view()}, sequences); };
  EXPECT_EQ(with(k_of(DType::bf16, 6, 2, 32)),
            "select_blocks: gate.k: expected 5 rows (a block of the sequences each), got 6");
  EXPECT_EQ(with(k_of(DType::bf16, 5, 3, 32)),
            "select_blocks: gate.k: expected a number of heads that divides 4 (the query heads), got 3");
  EXPECT_EQ(with(k_of(DType::bf16, 5, 2, 16)),
            "select_blocks: gate.k: expected head_dim 32 (that of gate.q), got 16");
  EXPECT_EQ(with(k_of(DType::f16, 5, 2, 32)),
            "select_blocks: gate.k: expected f32 or the dtype of gate.q, bf16, got f16");
  Tensor flat = q.view();
  flat.rank = 2;
  EXPECT_EQ(error_of({flat, k.view()}, sequences),
            "select_blocks: gate.q: expected rank 3, [tokens, heads, head_dim], got rank 2");
  EXPECT_EQ(error_of({q.view(), k.view()}, one_sequence(13, 20)),
            "select_blocks: cu_seqlens_q: expected to end at 12 (the tokens of q), got 13");
  EXPECT_EQ(error_of({q.view(), k.view()}, {{0, 12}, {0}}),
            "select_blocks: cu_seqlens_k: expected 2 entries (as cu_seqlens_q), got 1");
  const Array keys(DType::f32, 20, 2, 32), short_one(DType::f32, 4, 2, 32);
  EXPECT_THROW(block_features(keys.view(), {0, 20}, 4, {.max = short_one.view()}, execution()), Error);
  EXPECT_THROW(block_features(keys.view(), {0, 19}, 4, {}, execution()), Error);
  EXPECT_THROW(block_features(keys.view(), {0, 20}, 0, {}, execution()), Error);
  EXPECT_EQ(error_of({q.view(), k.view()}, sequences), "");
}

MOBA_FOR_EVERY_BACKEND(GateOfCaller);

}  // namespace
}  // namespace moba::test
