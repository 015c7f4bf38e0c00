// Top-k over vectors of scores: dismisses most scores by one comparison against a bound, and ranks the few
// that are left in registers where the instruction set allows.
#if defined(MOBA_CPU_TOPK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_TOPK_INL_H_
#undef MOBA_CPU_TOPK_INL_H_
#else
#define MOBA_CPU_TOPK_INL_H_
#endif

#include <bit>
#include <cstring>
#include <functional>
#include <limits>

#include "cpu/tile-inl.h"
#include "cpu/topk.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

constexpr auto kStep = static_cast<std::int64_t>(kLanes);

/// Returns the mask of the kLanes values that are not below `bound`; NaN is not below.
HWY_INLINE std::uint32_t not_below(Vec values, float bound) {
  const F32 d;
  std::conditional_t<kLanes <= 8, std::uint8_t, std::uint16_t> below = 0;
  hn::StoreMaskBits(d, hn::Lt(values, hn::Set(d, bound)), reinterpret_cast<std::uint8_t*>(&below));
  return ~static_cast<std::uint32_t>(below) & ((1U << kLanes) - 1);
}

HWY_INLINE std::uint32_t first_lanes(std::int64_t count) {
  return count >= kStep ? (1U << kLanes) - 1 : (1U << count) - 1;
}

#if HWY_TARGET <= HWY_AVX3
/// Counts, for every lane, the others that have a higher value, or the same value and come later.
HWY_INLINE __m512i ranks(__m512 values) {
  __m512i rank = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi32(1), bits = _mm512_castps_si512(values);
  const auto count = [&](auto by) HWY_ATTR {
    constexpr int kBy = decltype(by)::value;
    constexpr auto kLater = static_cast<__mmask16>((1U << (16 - kBy)) - 1);
    const __m512 other = _mm512_castsi512_ps(_mm512_alignr_epi32(bits, bits, kBy));
    const __mmask16 ahead = _mm512_cmp_ps_mask(other, values, _CMP_GT_OQ) |
                            _mm512_mask_cmp_ps_mask(kLater, other, values, _CMP_EQ_OQ);
    rank = _mm512_mask_add_epi32(rank, ahead, rank, one);
  };
  [&]<int... kBy>(std::integer_sequence<int, kBy...>) HWY_ATTR {
    (count(std::integral_constant<int, kBy + 1>()), ...);
  }
  (std::make_integer_sequence<int, 15>());
  return rank;
}

/// Returns the value with exactly `k - 1` others ahead of it.
HWY_INLINE float ranked(__m512 values, std::int64_t k) {
  const __mmask16 at = _mm512_cmpeq_epi32_mask(ranks(values), _mm512_set1_epi32(static_cast<int>(k - 1)));
  return _mm512_cvtss_f32(_mm512_maskz_compress_ps(at, values));
}
#else
float ranked(Vec values, std::int64_t k) {
  alignas(64) float lanes[kLanes];
  hn::Store(values, F32(), lanes);
  std::nth_element(lanes, lanes + k - 1, lanes + kLanes, std::greater<float>());
  return lanes[k - 1];
}
#endif

/// Returns a bound that at least `k` of `count` scores reach: each lane's maximum over all vectors is a score
/// of its own, so the `k`-th of them is one. -inf where no bound follows.
HWY_INLINE float topk_lower_bound(const float* scores, std::int64_t count, std::int64_t k) {
  if (k > kStep || count < kStep) return kNegInf;
  const F32 d;
  const Vec neg_inf = hn::Set(d, kNegInf);
  Vec best = neg_inf;
  for (std::int64_t i = 0; i + kStep <= count; i += kStep) {
    const Vec s = hn::LoadU(d, scores + i);
    best = hn::Max(hn::IfThenElse(hn::Eq(s, s), s, neg_inf), best);
  }
#if HWY_TARGET <= HWY_AVX3
  return ranked(best.raw, k);
#else
  return ranked(best, k);
#endif
}

/// Calls visit(i) for those of `count` values, at most kKeyTileSize, that are not below `bound`. All are
/// compared before the first is visited, so that a branch is taken for each of the few, not for each vector.
template <typename Visit>
HWY_INLINE void for_not_below(const float* values, std::int64_t count, float bound, Visit&& visit) {
  std::uint64_t hits[kKeyTileSize / 64] = {};
  auto* bytes = reinterpret_cast<std::uint8_t*>(hits);
  for (std::int64_t i = 0; i < count; i += kStep) {
    const std::uint32_t mask = not_below(hn::LoadU(F32(), values + i), bound) & first_lanes(count - i);
    if constexpr (kLanes >= 8) {
      std::memcpy(bytes + i / 8, &mask, kLanes / 8);
    } else {
      hits[i / 64] |= static_cast<std::uint64_t>(mask) << i % 64;
    }
  }
  for (std::int64_t word = 0; word * 64 < count; ++word) {
    for (std::uint64_t left = hits[word]; left != 0; left &= left - 1)
      visit(word * 64 + std::countr_zero(left));
  }
}

/// Pushes the scores of blocks [first, last) that are not below `bound` into a row's list.
void push_each(const float* scores, std::int64_t first, std::int64_t last, std::int64_t own, float bound,
               TopK& topk) {
  if (topk.count == topk.k) bound = std::max(bound, topk.scores[0]);
  for_not_below(scores, last - first, bound, [&](std::int64_t i) {
    if (first + i != own) topk.push(scores[i], static_cast<std::int32_t>(first + i));
  });
}

#if HWY_TARGET <= HWY_AVX3
/// Handles the first scores of a row: those that reach `bound`, above -inf, are few and are ranked in
/// registers, without a branch that could be mispredicted. Returns false when they are more than a vector
/// holds, or fewer than k.
bool push_ranked(const float* scores, std::int64_t first, std::int64_t last, float bound, TopK& topk) {
  const std::int64_t count = last - first;
  alignas(64) float reached[kKeyTileSize + kLanes];
  alignas(64) std::int32_t blocks[kKeyTileSize + kLanes];
  const __m512 min = _mm512_set1_ps(bound);
  __m512i block = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                   _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  std::int64_t taken = 0;
  for (std::int64_t i = 0; i < count; i += kStep) {
    const __m512 s = _mm512_loadu_ps(scores + i);
    const __mmask16 hits =
        _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(first_lanes(count - i)), s, min, _CMP_GE_OQ);
    _mm512_storeu_ps(reached + taken, _mm512_maskz_compress_ps(hits, s));
    _mm512_storeu_si512(blocks + taken, _mm512_maskz_compress_epi32(hits, block));
    taken += std::popcount(static_cast<unsigned>(hits));
    block = _mm512_add_epi32(block, _mm512_set1_epi32(16));
  }
  if (taken > kStep || taken < topk.k) return false;
  const auto filled = static_cast<__mmask16>(first_lanes(taken));
  alignas(64) std::int32_t rank[kLanes];
  _mm512_store_si512(rank, ranks(_mm512_mask_loadu_ps(_mm512_set1_ps(kNegInf), filled, reached)));
  for (std::int64_t i = 0; i < taken; ++i) {
    // Worst first; a block that is ranked too low falls on a place that better ones overwrite, or past the
    // row's own.
    const std::int64_t place = topk.k - 1 - rank[i];
    if (place < 0) continue;
    topk.scores[place] = reached[i];
    topk.blocks[place] = blocks[i];
  }
  topk.count = topk.k;
  return true;
}
#endif

void push_all(const float* scores, std::int64_t first, std::int64_t last, std::int64_t own, TopK& topk) {
  float bound = kNegInf;
  if (topk.count == 0 && own < 0) {
    bound = topk_lower_bound(scores, last - first, topk.k);
#if HWY_TARGET <= HWY_AVX3
    const float above = std::max(bound, std::numeric_limits<float>::lowest());
    if (push_ranked(scores, first, last, above, topk)) return;
#endif
  }
  push_each(scores, first, last, own, bound, topk);
}

/// Sorts up to kLanes blocks, all different: the general sort after this finds nothing to do.
HWY_INLINE void sort_blocks([[maybe_unused]] std::int32_t* blocks, [[maybe_unused]] std::int64_t count) {
#if HWY_TARGET <= HWY_AVX3
  if (count < 3 || count > kStep) return;
  const auto filled = static_cast<__mmask16>(first_lanes(count));
  const __m512i all = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), filled, blocks);
  // Block numbers are below 2^24 wherever they are this few; f32 compares them exactly.
  alignas(64) std::int32_t rank[kLanes], unsorted[kLanes];
  _mm512_store_si512(rank, ranks(_mm512_cvtepi32_ps(all)));
  _mm512_store_si512(unsorted, all);
  for (std::int64_t i = 0; i < count; ++i) blocks[count - 1 - rank[i]] = unsorted[i];
#endif
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
