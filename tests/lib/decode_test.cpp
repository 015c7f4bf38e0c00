// The cache: prefill in chunks and decode token by token give the results of one call.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <new>
#include <span>
#include <vector>

#include "backend.h"
#include "backends.h"
#include "cache_state.h"
#include "moba/cache.h"
#include "number.h"
#include "oracle.h"

namespace moba::test {
namespace {

using Decode = EveryBackend;

KvCache cache_for(const Case& c, std::int64_t sequences = 1) {
  return KvCache({.kv_heads = c.kv_heads,
                  .head_dim = c.head_dim,
                  .block_size = c.routing.block_size,
                  .dtype = c.dtype,
                  .sequences = sequences});
}

void append(KvCache& cache, const Case& c, std::int64_t first, std::int64_t count,
            std::int64_t sequence = 0) {
  cache.append(c.k.slice(first, count), c.v.slice(first, count), sequence);
}

Case small_case(DType dtype, const Routing& routing, std::int64_t tokens = 83) {
  Case c{.seed = 11, .dtype = dtype, .kv_heads = 2, .heads_per_kv = 3, .head_dim = 20};
  c.sequences = one_sequence(tokens);
  c.routing = routing;
  c.k_layout = Layout::padded;
  fill(c);
  return c;
}

std::vector<Routing> routings() {
  return {{.block_size = 8, .top_k = 3},   {.block_size = 8, .top_k = 4, .sink_blocks = 1},
          {.block_size = 5, .top_k = 1},   {.block_size = 1, .top_k = 6},
          {.block_size = 100, .top_k = 2}, {.block_size = 8, .top_k = Routing::kEverything}};
}

/// Returns the case of queries [first, first + count) and the keys up to the last of them.
Case part_of(const Case& c, std::int64_t first, std::int64_t count) {
  Case part = c;
  part.sequences = one_sequence(count, first + count);
  part.q = Array(c.dtype, count, c.q_heads(), c.head_dim);
  part.k = Array(c.dtype, first + count, c.kv_heads, c.head_dim);
  part.v = part.k;
  for (std::int64_t d = 0; d < c.head_dim; ++d) {
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      for (std::int64_t token = 0; token < count; ++token)
        part.q.set(token, head, d, c.q.get(first + token, head, d));
    }
    for (std::int64_t head = 0; head < c.kv_heads; ++head) {
      for (std::int64_t token = 0; token < first + count; ++token) {
        part.k.set(token, head, d, c.k.get(token, head, d));
        part.v.set(token, head, d, c.v.get(token, head, d));
      }
    }
  }
  return part;
}

/// Compares the rows of one decoded token with the oracle, given the selection of chunked prefill for it.
void check_decoded(const Case& c, const KvCache& cache, const Execution& execution, bool exact) {
  Result selected(c), decoded(c);
  attention(c.q.view(), cache, 0, c.routing, selected.outputs(), execution);
  check_result(c, selected, exact);
  decode(c.q.view(), cache, c.routing, {.out = decoded.out.view(), .lse = decoded.outputs().lse}, execution);
  decoded.selection = selected.selection;
  EXPECT_TRUE(decoded.fences_untouched());
  check_attended(c, decoded, exact);
}

TEST_P(Decode, DecodedTokensMatchTheOracle) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Routing& routing : routings()) {
      const Case c = small_case(dtype, routing);
      KvCache cache = cache_for(c);
      append(cache, c, 0, 50);
      for (std::int64_t token = 50; token < c.queries() && !HasFailure(); ++token) {
        append(cache, c, token, 1);
        ASSERT_EQ(cache.length(), token + 1);
        check_decoded(part_of(c, token, 1), cache, execution(), exact());
      }
    }
  }
}

/// Returns the weights [Hq, keys] of the last query on the keys of its selected blocks, in double.
std::vector<double> weights_of(const Case& last, const Result& selected) {
  const std::int64_t keys = last.keys();
  const double scale = 1 / std::sqrt(static_cast<double>(last.head_dim));
  std::vector<double> weights(static_cast<std::size_t>(last.q_heads() * keys));
  for (std::int64_t head = 0; head < last.q_heads(); ++head) {
    double* row = weights.data() + head * keys;
    double sum = 0;
    for (const std::int32_t block : selected.row(head, 0)) {
      const std::int64_t begin = block * std::min(last.routing.block_size, keys);
      for (std::int64_t key = begin; key < std::min(begin + last.routing.block_size, keys); ++key) {
        double logit = 0;
        for (std::int64_t d = 0; d < last.head_dim; ++d)
          logit += last.q.get(0, head, d) * last.k.get(key, head / last.heads_per_kv, d);
        sum += row[key] = std::exp(scale * logit);
      }
    }
    for (std::int64_t key = 0; key < keys; ++key) row[key] /= sum;
  }
  return weights;
}

TEST_P(Decode, WeightsOfRangesMatchASoftmaxInDouble) {
  constexpr std::int64_t kKeys = 700;
  std::vector<Routing> of = routings();
  of.push_back({.block_size = 300, .top_k = 2});
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const Routing& routing : of) {
      const Case c = small_case(dtype, routing, kKeys);
      KvCache cache = cache_for(c, 2);
      append(cache, c, 0, kKeys, 0);
      append(cache, c, 0, kKeys - 1, 1);
      const Case last = part_of(c, kKeys - 1, 1);
      Result selected(last);
      attention(last.q.view(), cache, 0, routing, selected.outputs(), execution());
      const std::vector<double> expected = weights_of(last, selected);

      Case batch = c;
      batch.sequences = one_sequence(2);
      batch.q = Array(dtype, 2, c.q_heads(), c.head_dim);
      for (std::int64_t head = 0; head < c.q_heads(); ++head) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          batch.q.set(0, head, d, last.q.get(0, head, d));
          batch.q.set(1, head, d, last.q.get(0, head, d));
        }
      }
      Result plain(batch);
      decode(batch.q.view(), cache, routing, {.out = plain.out.view(), .lse = plain.outputs().lse},
             execution());
      for (const std::int64_t range : {1, 8, 7, 64, 1000}) {
        for (const std::int64_t counted : {kKeys, std::int64_t{130}, std::int64_t{1}, std::int64_t{0}}) {
          const std::int64_t ranges = (counted + range - 1) / range;
          std::vector<float> found(static_cast<std::size_t>(c.q_heads() * ranges) + 1, 7.0F);
          const KeyWeights weights[2] = {{.data = found.data(), .range = range, .keys = counted}, {}};
          Result result(batch);
          decode(batch.q.view(), cache, routing,
                 {.out = result.out.view(), .lse = result.outputs().lse, .weights = weights}, execution());
          EXPECT_TRUE(result == plain);  // weights cost no bit of the output
          EXPECT_EQ(found.back(), 7.0F);
          for (std::int64_t head = 0; head < c.q_heads(); ++head) {
            for (std::int64_t r = 0; r < ranges; ++r) {
              double sum = 0;
              for (std::int64_t key = r * range; key < std::min((r + 1) * range, counted); ++key)
                sum += expected[static_cast<std::size_t>(head * kKeys + key)];
              ASSERT_NEAR(found[static_cast<std::size_t>(head * ranges + r)], sum, 2e-6)
                  << name_of(dtype) << ", blocks of " << routing.block_size << ", range " << r << " of "
                  << range;
            }
          }
        }
      }
    }
  }
}

TEST_P(Decode, InvalidWeightsThrow) {
  const Case c = small_case(DType::f32, {.block_size = 8, .top_k = 3}, 20);
  KvCache cache = cache_for(c);
  append(cache, c, 0, 20);
  const Case last = part_of(c, 19, 1);
  Result result(last);
  float data[200];
  const auto run = [&](const KeyWeights& weights) {
    decode(last.q.view(), cache, c.routing, {.out = result.out.view(), .weights = {&weights, 1}},
           execution());
  };
  EXPECT_THROW(run({.data = data, .range = 0, .keys = 20}), Error);
  EXPECT_THROW(run({.data = data, .range = 1, .keys = 21}), Error);
  EXPECT_THROW(run({.data = data, .range = 1, .keys = -1}), Error);
  EXPECT_NO_THROW(run({.data = data, .range = 1, .keys = 20}));
  const KeyWeights two[2]{};
  EXPECT_THROW(
      decode(last.q.view(), cache, c.routing, {.out = result.out.view(), .weights = two}, execution()),
      Error);
  EXPECT_THROW(
      attention(last.q.view(), cache, 0, c.routing, {.out = result.out.view(), .weights = two}, execution()),
      Error);
}

/// Query heads share the rows of their kv head in groups, whose size depends on the instruction set.
TEST_P(Decode, AnyNumberOfHeadsMatchesTheOracle) {
  for (const std::int64_t heads_per_kv : {1, 2, 4, 5, 7, 9}) {
    for (const std::int64_t head_dim : {16, 48, 64, 256}) {
      Case c{.seed = 21, .dtype = DType::bf16, .kv_heads = 2, .heads_per_kv = heads_per_kv};
      c.head_dim = head_dim;
      c.sequences = one_sequence(200);
      c.routing = {.block_size = 16, .top_k = 4};
      fill(c);
      KvCache cache = cache_for(c);
      append(cache, c, 0, 200);
      check_decoded(part_of(c, 199, 1), cache, execution(), exact());
    }
  }
}

TEST_P(Decode, ChunkedPrefillMatchesOneCall) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const Routing& routing : routings()) {
      const Case c = small_case(dtype, routing);
      const Result expected = run_attention(c, execution());
      for (const std::int64_t step : {1, 7, 13, 64, 83}) {
        KvCache cache = cache_for(c);
        for (std::int64_t first = 0; first < c.queries(); first += step) {
          const Case part = part_of(c, first, std::min(step, c.queries() - first));
          append(cache, c, first, part.queries());
          Result found(part);
          attention(part.q.view(), cache, 0, c.routing, found.outputs(), execution());
          check_result(part, found, exact());
          for (std::int64_t token = 0; token < part.queries() && !HasFailure(); ++token) {
            for (std::int64_t head = 0; head < c.q_heads(); ++head)
              EXPECT_EQ(found.row(head, token), expected.row(head, first + token)) << describe(part);
          }
        }
      }
    }
  }
}

/// Bytes of the pages in use, and of the means and sums.
std::vector<std::byte> contents_of(const KvCache& cache) {
  const CacheState& state = state_of(cache);
  const CacheState::Sequence& s = state.sequences.front();
  std::vector<std::byte> bytes;
  const auto add = [&](const void* from, std::size_t size) {
    const auto* first = static_cast<const std::byte*>(from);
    bytes.insert(bytes.end(), first, first + size);
  };
  const auto element = static_cast<std::int64_t>(size_of(state.shape.dtype));
  for (const auto* pages : {&s.k_pages, &s.v_pages}) {
    for (std::int64_t token = 0; token < s.length; ++token) {
      for (std::int64_t head = 0; head < state.shape.kv_heads; ++head) {
        const CacheRow row = cache_row(state.layout(), *pages, token, head);
        add(row.data, static_cast<std::size_t>(state.shape.head_dim * element));
        if (row.scale != nullptr) add(row.scale, sizeof(float));
      }
    }
  }
  add(s.means.data(), s.means.size() * sizeof(float));
  return bytes;
}

/// Values whose rounding is the same in every backend only if it is done with care: halfway cases, values out
/// of range, subnormals, not finite ones.
Case hard_to_round(DType dtype) {
  Case c = small_case(dtype, {.block_size = 8, .top_k = 3}, 600);
  const std::vector<double> values = {1.00390625, 1.01171875, 1.00048828125, 1.00146484375, 65519.0,
                                      65520.0,    -1e30,      1e-5,          6e-8,          -2.98e-8,
                                      1e-40,      -0.0,       INFINITY,      -INFINITY,     NAN};
  std::size_t next = 0;
  for (std::int64_t token = 3; token < 600; token += 5) {
    for (std::int64_t head = 0; head < c.kv_heads; ++head) {
      for (std::int64_t d = token % 7; d < c.head_dim; d += 7) {
        c.k.set(token, head, d, values[next++ % values.size()]);
        c.v.set(token, head, d, values[next++ % values.size()]);
      }
    }
  }
  return c;
}

TEST_P(Decode, AppendStoresTheBitsOfTheReference) {
  for (const DType from : {DType::f32, DType::bf16, DType::f16}) {
    const Case c = hard_to_round(from);
    for (const DType to : {DType::f32, DType::bf16, DType::f16, DType::i8}) {
      const KvCache::Shape shape{.kv_heads = 2, .head_dim = 20, .block_size = 8, .dtype = to};
      KvCache expected(shape);
      expected.append(c.k.view(), c.v.view(), 0, {.backend = "reference", .parallel = serial()});
      for (const Parallel& parallel : {serial(), openmp(3), std_threads(4)}) {
        const Execution settings{.backend = GetParam(), .parallel = parallel};
        KvCache whole(shape), pieces(shape);
        whole.append(c.k.view(), c.v.view(), 0, settings);
        std::int64_t first = 0;
        for (const std::int64_t count : {3, 1, 300, 290, 6}) {
          pieces.append(c.k.slice(first, count), c.v.slice(first, count), 0, settings);
          first += count;
        }
        EXPECT_TRUE(contents_of(whole) == contents_of(expected)) << name_of(from) << " in " << name_of(to);
        EXPECT_TRUE(contents_of(pieces) == contents_of(expected)) << name_of(from) << " in " << name_of(to);
      }
    }
  }
}

/// Returns the keys or values that attention reads, rounded to `dtype`.
Array values_of(const KvCache& cache, bool keys, DType dtype) {
  const CacheState& state = state_of(cache);
  const CacheState::Sequence& s = state.sequences.front();
  Array values(dtype, s.length, state.shape.kv_heads, state.shape.head_dim);
  for (std::int64_t token = 0; token < s.length; ++token) {
    for (std::int64_t head = 0; head < state.shape.kv_heads; ++head) {
      const CacheRow row = cache_row(state.layout(), keys ? s.k_pages : s.v_pages, token, head);
      for (std::int64_t d = 0; d < state.shape.head_dim; ++d) {
        const auto value = static_cast<float>(load(row.data, state.shape.dtype, d));
        values.set(token, head, d, row.scale == nullptr ? value : value * *row.scale);
      }
    }
  }
  return values;
}

/// Fails the test unless the error is at most twice that of a framework, which rounds the keys and values to
/// the dtype of q.
void check_mixed(const Case& c, const KvCache& cache, const Result& result) {
  Case exact = c, rounded = c;
  exact.k = values_of(cache, true, DType::f32);
  exact.v = values_of(cache, false, DType::f32);
  rounded.k = values_of(cache, true, c.dtype);
  rounded.v = values_of(cache, false, c.dtype);
  const Attended<double> truth = attend_densely<double>(exact, result);
  const Attended<float> plain = attend_densely<float>(rounded, result);
  const double unit = c.dtype == DType::bf16 ? 0x1p-8 : c.dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
  double out_allowed = 1e-6, lse_allowed = 1e-6;
  for (std::size_t i = 0; i < truth.out.size(); ++i)
    out_allowed = std::max(out_allowed, 2 * std::fabs(static_cast<double>(plain.out[i]) - truth.out[i]));
  for (std::size_t i = 0; i < truth.lse.size(); ++i)
    lse_allowed = std::max(lse_allowed, 2 * std::fabs(static_cast<double>(plain.lse[i]) - truth.lse[i]));
  std::size_t i = 0, row = 0;
  for (std::int64_t head = 0; head < c.q_heads(); ++head) {
    for (std::int64_t token = 0; token < c.queries(); ++token, ++row) {
      EXPECT_NEAR(result.lse_at(head, token), truth.lse[row], lse_allowed + 1e-6 * std::fabs(truth.lse[row]));
      for (std::int64_t d = 0; d < c.head_dim; ++d, ++i)
        EXPECT_NEAR(result.out.get(token, head, d), truth.out[i],
                    out_allowed + unit * std::fabs(truth.out[i]));
    }
  }
}

TEST_P(Decode, AnyQueriesOnAnyCacheMatchTheOracle) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const DType cached : {DType::f32, DType::bf16, DType::f16, DType::i8}) {
      for (const std::int64_t head_dim : {40, 64}) {
        for (const Routing& routing : {Routing{.block_size = 16, .top_k = 4},
                                       Routing{.block_size = 16, .top_k = Routing::kEverything}}) {
          Case c{.seed = 31, .dtype = dtype, .kv_heads = 2, .heads_per_kv = 3, .head_dim = head_dim};
          c.sequences = one_sequence(120);
          c.routing = routing;
          fill(c);
          KvCache cache({.kv_heads = 2, .head_dim = head_dim, .block_size = 16, .dtype = cached});
          append(cache, c, 0, 120);
          const Case chunk = part_of(c, 99, 21), last = part_of(c, 119, 1);
          Result found(chunk), expected(chunk), decoded(last), selected(last);
          attention(chunk.q.view(), cache, 0, routing, found.outputs(), execution());
          attention(chunk.q.view(), cache, 0, routing, expected.outputs(), {.backend = "reference"});
          EXPECT_EQ(found.selection, expected.selection);
          check_mixed(chunk, cache, found);
          attention(last.q.view(), cache, 0, routing, selected.outputs(), execution());
          moba::decode(last.q.view(), cache, routing,
                       {.out = decoded.out.view(), .lse = decoded.outputs().lse}, execution());
          decoded.selection = selected.selection;
          check_mixed(last, cache, decoded);
          ASSERT_FALSE(HasFailure()) << name_of(dtype) << " on " << name_of(cached);
        }
      }
    }
  }
}

TEST_P(Decode, TruncateRestoresTheEarlierResult) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::i8}) {
    Case c = small_case(dtype == DType::i8 ? DType::f32 : dtype, {.block_size = 8, .top_k = 3}, 150);
    Case other = c;
    other.seed = 12;
    fill(other);
    const KvCache::Shape shape{.kv_heads = 2, .head_dim = 20, .block_size = 8, .dtype = dtype};
    KvCache fresh(shape), used(shape);
    append(fresh, c, 0, 150);
    append(used, c, 0, 69);
    append(used, other, 69, 81);
    used.truncate(131);
    used.truncate(69);
    EXPECT_EQ(used.length(), 69);
    used.truncate(40);
    append(used, c, 40, 110);
    const Case last = part_of(c, 149, 1);
    Result expected(last), found(last);
    attention(last.q.view(), fresh, 0, c.routing, expected.outputs(), execution());
    attention(last.q.view(), used, 0, c.routing, found.outputs(), execution());
    EXPECT_TRUE(found == expected) << moba::name_of(dtype);
  }
}

TEST_P(Decode, BatchMatchesEachSequenceAlone) {
  const std::vector<std::int64_t> lengths = {40, 0, 1, 83, 8};
  const Case c = small_case(DType::f32, {.block_size = 8, .top_k = 3});
  KvCache cache = cache_for(c, static_cast<std::int64_t>(lengths.size()));
  for (std::size_t s = 0; s < lengths.size(); ++s)
    append(cache, c, 0, lengths[s], static_cast<std::int64_t>(s));

  Case batch = c;
  batch.sequences = one_sequence(static_cast<std::int64_t>(lengths.size()));
  Result found(batch);
  decode(c.q.slice(0, batch.queries()), cache, c.routing,
         {.out = found.out.view(), .lse = found.outputs().lse}, execution());
  EXPECT_TRUE(found.fences_untouched());
  for (std::int64_t s = 0; s < batch.queries(); ++s) {
    Case single = c;
    single.sequences = one_sequence(1, lengths[static_cast<std::size_t>(s)]);
    Result expected(single);
    attention(c.q.slice(s, 1), cache, s, c.routing, expected.outputs(), execution());
    for (std::int64_t head = 0; head < c.q_heads(); ++head) {
      const float lse = expected.lse_at(head, 0);
      EXPECT_EQ(std::isinf(lse), lengths[static_cast<std::size_t>(s)] == 0);
      if (std::isinf(lse)) {
        EXPECT_EQ(found.lse_at(head, s), lse);
      } else {
        EXPECT_NEAR(found.lse_at(head, s), lse, 1e-5);
      }
      for (std::int64_t d = 0; d < c.head_dim; ++d)
        EXPECT_NEAR(found.out.get(s, head, d), expected.out.get(0, head, d), 1e-5);
    }
  }
}

/// Covers more candidates than one split of the gate holds, each three times, so that equal scores lie in
/// different splits; lists shorter and longer than the selection; blocks of several splits.
TEST_P(Decode, ManyBlocksAndTiesMatchTheOracle) {
  const std::vector<Routing> wide = {{.block_size = 2, .top_k = 6},
                                     {.block_size = 1, .top_k = 9, .sink_blocks = 2},
                                     {.block_size = 1, .top_k = 300},
                                     {.block_size = 150, .top_k = 3}};
  for (const Routing& routing : wide) {
    Case c = small_case(DType::f32, routing, 903);
    for (std::int64_t token = 300; token < 900; ++token) {
      for (std::int64_t head = 0; head < c.kv_heads; ++head) {
        for (std::int64_t d = 0; d < c.head_dim; ++d) c.k.set(token, head, d, c.k.get(token - 300, head, d));
      }
    }
    KvCache cache = cache_for(c);
    append(cache, c, 0, 903);
    const Case last = part_of(c, 902, 1);
    check_decoded(last, cache, execution(), exact());
    const auto run = [&](const Parallel& parallel) {
      Result result(last);
      decode(last.q.view(), cache, routing, {.out = result.out.view(), .lse = result.outputs().lse},
             {.backend = GetParam(), .parallel = parallel});
      return result;
    };
    const Result expected = run(serial());
    for (const Parallel& parallel : {openmp(2), std_threads(5)}) EXPECT_TRUE(run(parallel) == expected);
  }
}

/// Pages of two layers, and the means of one sequence of one of them.
class Pages {
 public:
  Pages(const PageLayout& layout, std::int64_t count) : bytes_(layout.offset + page_bytes(layout)) {
    for (std::int64_t i = 0; i < count; ++i) {
      pages_.push_back(static_cast<std::byte*>(::operator new (bytes_, std::align_val_t{64})));
      owned_.emplace_back(pages_.back());
    }
  }
  std::span<std::byte* const> view() const { return pages_; }
  /// Shares the first `count` pages of `other`.
  void share(const Pages& other, std::size_t count) {
    std::copy_n(other.pages_.begin(), count, pages_.begin());
  }

 private:
  struct Delete {
    void operator()(std::byte* page) const { ::operator delete (page, std::align_val_t{64}); }
  };
  std::size_t bytes_;
  std::vector<std::byte*> pages_;
  std::vector<std::unique_ptr<std::byte, Delete>> owned_;
};

TEST_P(Decode, SharedPagesOfTheCallerGiveTheBitsOfACache) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::i8}) {
    for (const std::int64_t page_tokens : {8, 24, 5}) {
      Case c = small_case(dtype == DType::i8 ? DType::f32 : dtype, {.block_size = 8, .top_k = 3}, 121);
      Case other = c;
      other.seed = 12;
      fill(other);
      PageLayout layout{
          .kv_heads = 2, .head_dim = 20, .block_size = 8, .page_tokens = page_tokens, .dtype = dtype};
      layout.offset = page_bytes(layout);  // after another layer
      KvCache cache({.kv_heads = 2, .head_dim = 20, .block_size = 8, .dtype = dtype, .sequences = 2});
      const std::int64_t shared = page_tokens == 5 ? 40 : 48;  // whole pages and blocks
      const Case* of[2] = {&c, &other};
      Pages pages[2] = {{layout, 121 / page_tokens + 1}, {layout, 121 / page_tokens + 1}};
      std::vector<float> means[2];
      PagedSequence sequences[2];
      for (std::size_t s = 0; s < 2; ++s) {
        const std::int64_t begin = s == 0 ? 0 : shared;
        append(cache, c, 0, begin, static_cast<std::int64_t>(s));
        means[s].assign(16 * 40, 0.0F);
        if (s == 1) {
          pages[1].share(pages[0], static_cast<std::size_t>(begin / page_tokens));
          std::copy_n(means[0].begin(), begin / 8 * 40, means[1].begin());
        }
        sequences[s] = {.length = begin, .pages = pages[s].view(), .means = means[s].data()};
        for (const std::int64_t end : {begin + 3, begin + 20, std::int64_t{121}}) {
          const auto k = of[s]->k.slice(sequences[s].length, end - sequences[s].length),
                     v = of[s]->v.slice(sequences[s].length, end - sequences[s].length);
          cache.append(k, v, static_cast<std::int64_t>(s), execution());
          moba::append(k, v, layout, sequences[s], execution());
          sequences[s].length = end;
        }
        const Case chunk = part_of(*of[s], 90, 31);
        Result expected(chunk), found(chunk);
        attention(chunk.q.view(), cache, static_cast<std::int64_t>(s), c.routing, expected.outputs(),
                  execution());
        attention(chunk.q.view(), layout, sequences[s], c.routing, found.outputs(), execution());
        EXPECT_TRUE(found == expected) << moba::name_of(dtype) << ", pages of " << page_tokens;
      }
      Case batch = c;
      batch.sequences = one_sequence(2);
      Result expected(batch), found(batch);
      decode(c.q.slice(0, 2), cache, c.routing, {.out = expected.out.view(), .lse = expected.outputs().lse},
             execution());
      decode(c.q.slice(0, 2), layout, sequences, c.routing,
             {.out = found.out.view(), .lse = found.outputs().lse}, execution());
      EXPECT_TRUE(found == expected) << moba::name_of(dtype) << ", pages of " << page_tokens;
    }
  }
}

/// Rows whose largest magnitude is 127 have a scale of 1, so integers are exact in 8 bits.
TEST_P(Decode, Int8CacheIsExactForIntegers) {
  Case c = small_case(DType::f32, {.block_size = 8, .top_k = 3}, 60);
  c.values = Values::integers;
  c.routing.scale = 0.01F;
  fill(c);
  for (std::int64_t token = 0; token < 60; ++token) {
    for (std::int64_t head = 0; head < 2; ++head) {
      c.k.set(token, head, 0, token % 2 == 0 ? 127 : -127);
      for (std::int64_t d = 0; d < c.head_dim; ++d)
        c.v.set(token, head, d, static_cast<double>((token * 7 + d) % 100));
      c.v.set(token, head, 0, 127);
    }
  }
  KvCache cache({.kv_heads = 2, .head_dim = c.head_dim, .block_size = 8, .dtype = DType::i8});
  append(cache, c, 0, 60);
  check_decoded(part_of(c, 59, 1), cache, execution(), exact());
}

TEST_P(Decode, Int8CacheIsCloseToF32) {
  const Case c = small_case(DType::f32, Routing::full(), 100);
  KvCache cache({.kv_heads = 2, .head_dim = 20, .block_size = 512, .dtype = DType::i8});
  append(cache, c, 0, 100);
  const Case last = part_of(c, 99, 1);
  const Result expected = run_attention(last, execution());
  Result found(last);
  attention(last.q.view(), cache, 0, c.routing, found.outputs(), execution());
  for (std::int64_t head = 0; head < 6; ++head) {
    for (std::int64_t d = 0; d < 20; ++d)
      EXPECT_NEAR(found.out.get(0, head, d), expected.out.get(0, head, d), 0.03);
  }
  KvCache wide({.kv_heads = 2, .head_dim = 20, .block_size = 512});
  append(wide, c, 0, 100);
  EXPECT_LT(cache.bytes() * 2, wide.bytes());
}

TEST_P(Decode, AnyThreadsGiveTheSameBits) {
  const Case c = small_case(DType::bf16, {.block_size = 4, .top_k = 5}, 300);
  KvCache cache = cache_for(c);
  append(cache, c, 0, 300);
  const Case last = part_of(c, 299, 1);
  const auto run = [&](const Parallel& parallel) {
    Result result(last);
    decode(last.q.view(), cache, c.routing, {.out = result.out.view(), .lse = result.outputs().lse},
           {.backend = GetParam(), .parallel = parallel});
    return result;
  };
  const Result expected = run(serial());
  for (const Parallel& parallel : {serial(), openmp(2), openmp(7), std_threads(2), std_threads(7)})
    EXPECT_TRUE(run(parallel) == expected) << parallel.threads << " threads";
}

MOBA_FOR_EVERY_BACKEND(Decode);

}  // namespace
}  // namespace moba::test
