// f32 products on bf16 matrix units (F32AsBf16x6; Henry, Tang, Heinecke 2019, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations"). Each value is split into three bf16
// parts of 8 bits each, whose sum is exactly the value, and a product of two values is the six products of
// parts that exceed f32's own rounding. Values are stored as words of two: i and i + 16 of 32 neighbours in
// depth, which costs two instructions instead of a shuffle; both operands of a product use the same order.
// Non-finite values cannot be split (inf - inf is NaN).
#if defined(MOBA_CPU_BF16X6_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BF16X6_INL_H_
#undef MOBA_CPU_BF16X6_INL_H_
#else
#define MOBA_CPU_BF16X6_INL_H_
#endif

#include "cpu/matrix_tiles.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

constexpr std::size_t kPairWords = kBf16Depth / 2;

/// Splits 32 values into 16 words of each part. Truncating, unlike rounding, takes one instruction a part.
HWY_INLINE void split_bf16x3(Vec left, Vec right, __m512i* words) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
  __m512 l = left.raw, r = right.raw;
#pragma GCC unroll 3
  for (std::size_t part = 0; part < kMaxParts; ++part) {
    const __m512i low = _mm512_castps_si512(l), high = _mm512_castps_si512(r);
    // low >> 16 | (high & upper)
    words[part] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, upper, 0xF8);
    if (part + 1 == kMaxParts) break;
    l = _mm512_sub_ps(l, _mm512_castsi512_ps(_mm512_and_si512(low, upper)));
    r = _mm512_sub_ps(r, _mm512_castsi512_ps(_mm512_and_si512(high, upper)));
  }
}

/// Rounds to bf16, to nearest, ties to even, as to_bfloat16 (number.h) does; the result is the upper half of
/// each word. In integers, because not every CPU with AVX-512 has vcvtneps2bf16. Not for NaN.
HWY_INLINE __m512i round_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.raw),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}

/// Rounds values to one bf16 part: to nearest, ties to even.
HWY_INLINE __m512i round_words(Vec left, Vec right) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(round_to_bf16(left), 16), round_to_bf16(right),
                                   _mm512_set1_epi32(static_cast<int>(0xFFFF0000U)), 0xF8);
}

/// Splits and stores; part p starts p * part_stride words after the first. A single part is rounded instead
/// of split.
template <std::size_t kParts = kMaxParts>
HWY_INLINE void store_bf16x3(Vec left, Vec right, std::uint32_t* to, std::size_t part_stride) {
  if constexpr (kParts == 1) {
    _mm512_storeu_si512(to, round_words(left, right));
  } else {
    __m512i words[kMaxParts];
    split_bf16x3(left, right, words);
    for (std::size_t part = 0; part < kMaxParts; ++part)
      _mm512_storeu_si512(to + part * part_stride, words[part]);
  }
}

HWY_INLINE Vec load_masked(const float* row, std::size_t size, std::size_t at) {
  if (at + kLanes <= size) return hn::LoadU(F32(), row + at);
  return hn::MaskedLoad(hn::FirstN(F32(), size > at ? size - at : 0), F32(), row + at);
}

/// Splits a row of `size` values into rows of a product; zeros follow the last.
template <std::size_t kParts = kMaxParts>
HWY_INLINE void split_row_bf16x3(const float* row, std::size_t size, std::uint32_t* to,
                                 std::size_t part_stride) {
  for (std::size_t at = 0; at < size; at += kBf16Depth) {
    store_bf16x3<kParts>(load_masked(row, size, at), load_masked(row, size, at + kPairWords), to + at / 2,
                         part_stride);
  }
}

/// Split rows `first` to `first` + 15 of a panel of 32 columns, [depth / 2][32] words a part, from `words`,
/// [part][16][stride].
template <std::size_t kParts = kMaxParts>
HWY_INLINE void transpose_bf16x3(const std::uint32_t* words, std::size_t stride, std::size_t depth,
                                 std::uint32_t* panel, std::size_t panel_part) {
  for (std::size_t part = 0; part < kParts; ++part) {
    std::array<const float*, kLanes> from;
    for (std::size_t r = 0; r < kLanes; ++r)
      from[r] = reinterpret_cast<const float*>(words + (part * kLanes + r) * stride);
    transpose_rows(from.data(), depth / 2, reinterpret_cast<float*>(panel + part * panel_part));
  }
}

/// Row pairs (i, i + 16) of 32 rows, [depth panels][part][pairs][32] words: the other operand's panels.
/// Panels are `panel_stride` words apart.
template <std::size_t kParts = kMaxParts>
HWY_INLINE void zip_rows(const float* const* rows, std::size_t size, std::uint32_t* panels_to,
                         std::size_t panel_stride, std::size_t panel_part) {
  for (std::size_t column = 0; column < round_up(size, kBf16Depth); column += kLanes) {
    std::uint32_t* to = panels_to + column / kMatrixCols * panel_stride + column % kMatrixCols;
    for (std::size_t pair = 0; pair < kPairWords; ++pair) {
      store_bf16x3<kParts>(load_masked(rows[pair], size, column),
                           load_masked(rows[pair + kPairWords], size, column), to + pair * kMatrixCols,
                           panel_part);
    }
  }
}

#endif

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
