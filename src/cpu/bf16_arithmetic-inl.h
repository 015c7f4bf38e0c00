// Tile arithmetic of bf16 matrix instructions (AMX or AVX512-BF16), for q in bf16. Keys and values in f16 or
// i8 are rounded to bf16 while they are packed (docs/mathematics.md, "Mixed types").
#if defined(MOBA_CPU_BF16_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BF16_ARITHMETIC_INL_H_
#undef MOBA_CPU_BF16_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_BF16_ARITHMETIC_INL_H_
#endif

#include "cpu/bf16x6-inl.h"
#include "cpu/matrix_tiles.h"
#include "cpu/tile_arithmetic-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
struct BFloat16 {
  static constexpr std::size_t kHeight = kMaxTileRows, kMaxKeys = kKeyTileSize;
  static constexpr bool kEqualTiles = true, kPrefetchesRows = false;
  /// All panels are multiplied in one call, so the prefetch steps that other arithmetics take between panels
  /// are taken before it.
  static constexpr int kPrefetchSteps = 4;

  TileScratch& tile;
  std::size_t head_dim;
  bfloat16* keys;    // [count / 32][depth / 2][32][2], depth = D rounded up to 32
  bfloat16* values;  // [depth / 32][count / 2][32][2]
  std::size_t count = 0;
  KvSource source{};
  KeySet nonfinite_values{};

  const Bf16Tiles& tiles = *bf16_tiles();

  std::size_t depth() const { return round_up(head_dim, kBf16Depth); }
  std::size_t padded_count() const { return round_up(count, kBf16Depth); }

  void pack(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&call, &sequence, head, first, keys_count};
    pack_keys(call, sequence, head, first, keys_count);
    nonfinite_values.reset();
    auto* zeros = reinterpret_cast<bfloat16*>(tile.f32_rows + kMaxLanes * kMaxHeadDim);
    const bfloat16* even = nullptr;
    const auto value = [&](std::size_t index, const bfloat16* row) HWY_ATTR {
      if (index % 2 == 0) {
        even = row;
      } else {
        zip_values(index / 2, even, row);
      }
    };
    source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const bfloat16* row = row_as_bf16(from, call.v.dtype, i, tile.f32_rows + index % 2 * kMaxHeadDim);
      nonfinite_values[index] = !all_finite(row);
      value(index, nonfinite_values[index] ? zeros : row);
    });
    for (std::size_t index = count; index < padded_count(); ++index) value(index, zeros);
  }
  float weight(std::size_t r, std::size_t column) const {
    return float_of(bfloat16{tile.weights[r * kWeightStride + column]});
  }

  void gather(std::size_t r, const std::byte* query, DType /*dtype*/, float sign) {
    auto* to = reinterpret_cast<std::uint16_t*>(tile.rows) + r * kRowStride;
    const auto* from = reinterpret_cast<const std::uint16_t*>(query);
    const std::uint16_t flip = sign < 0 ? 0x8000 : 0, keep = sign == 0 ? 0 : 0xFFFF;
    for (std::size_t i = 0; i < head_dim; ++i) to[i] = static_cast<std::uint16_t>((from[i] ^ flip) & keep);
    std::fill(to + head_dim, to + depth(), std::uint16_t{0});
  }

  template <typename Between>
  void score(std::size_t rows, std::size_t columns, Between&& between) {
    const auto* from = reinterpret_cast<const bfloat16*>(tile.rows);
    for_tiles(rows, [&](std::size_t first, std::size_t n) HWY_ATTR {
      for (int i = 0; i < kPrefetchSteps; ++i) between();
      tiles.multiply(from + first * kRowStride, kRowStride, n, keys, depth() * kMatrixCols,
                     round_up(columns, kMatrixCols), depth(), tile.scores + first * kScoreStride,
                     kScoreStride);
    });
  }

  void store_weights(std::size_t r, std::size_t column, Vec left, Vec right) {
    // A NaN weight implies that its row is NaN already.
    const __m256i low = to_bf16(left), high = to_bf16(right);
    auto* to = reinterpret_cast<std::uint16_t*>(tile.weights) + r * kWeightStride + column;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), high);
  }

  template <typename Between>
  void add_values(std::size_t rows, std::size_t columns, Between&& between) {
    const auto* from = reinterpret_cast<const bfloat16*>(tile.weights);
    for_tiles(rows, [&](std::size_t first, std::size_t n) HWY_ATTR {
      for (int i = 0; i < kPrefetchSteps; ++i) between();
      tiles.multiply(from + first * kWeightStride, kWeightStride, n, values, padded_count() * kMatrixCols,
                     depth(), round_up(columns, kBf16Depth), tile.product + first * kRowStride, kRowStride);
    });
    const F32 d;
    for (std::size_t r = 0; r < rows; ++r) {
      const Vec keep = hn::Set(d, tile.rescale[r]);
      const float* product = tile.product + r * kRowStride;
      float* out = tile.out[r];
      for (std::size_t i = 0; i < depth(); i += kLanes) {
        hn::Store(hn::MulAdd(keep, hn::Load(d, out + i), hn::Load(d, product + i)), d, out + i);
      }
    }
  }

 private:
  bool all_finite(const bfloat16* row) const {
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    __mmask32 nonfinite = 0;
    for (std::size_t i = 0; i < head_dim; i += kBf16Depth) {
      const std::size_t left = std::min(head_dim - i, kBf16Depth);
      const auto mask = static_cast<__mmask32>((std::uint64_t{1} << left) - 1);
      nonfinite |= _mm512_cmpeq_epi16_mask(
          _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, row + i), exponent), exponent);
    }
    return nonfinite == 0;
  }
  static __m256i to_bf16(Vec x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(x), 16)); }

  template <typename Tile>
  void for_tiles(std::size_t rows, Tile&& multiply) {
    for (std::size_t first = 0; first < rows; first += tiles.rows)
      multiply(first, std::min(tiles.rows, rows - first));
  }

  /// Returns row `index` of `rows` as bf16: in place when it is bf16, else rounded into `scratch`.
  const bfloat16* row_as_bf16(const Rows& rows, DType dtype, std::int64_t index, float* scratch) const {
    if (dtype == DType::bf16) return reinterpret_cast<const bfloat16*>(rows.data) + index * rows.stride;
    alignas(64) float f32_row[kMaxHeadDim];
    store_f32(row_as_f32(rows, dtype, index, head_dim, f32_row), head_dim, 1.0F, DType::bf16,
              reinterpret_cast<std::byte*>(scratch));
    return reinterpret_cast<const bfloat16*>(scratch);
  }

  /// Packs the keys; a pair of bf16 values is moved as one float.
  void pack_keys(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t first,
                 std::int64_t keys_count) {
    Rows rows;
    std::int64_t begin = 0;
    const auto key = [&](std::size_t i, float* scratch) HWY_ATTR -> const float* {
      const auto index = static_cast<std::int64_t>(i);
      if (index >= begin + rows.count || index == 0) {
        begin = index;
        rows = call.keys(sequence, head, first + index);
      }
      const bfloat16* row = row_as_bf16(rows, call.k.dtype, index - begin, scratch);
      if (head_dim % kBf16Depth == 0) return reinterpret_cast<const float*>(row);
      auto* padded = reinterpret_cast<bfloat16*>(scratch);
      if (row != padded) std::copy_n(row, head_dim, padded);
      std::fill(padded + head_dim, padded + depth(), bfloat16{});
      return scratch;
    };
    pack_transposed(static_cast<std::size_t>(keys_count), depth() / 2, key, tile.f32_rows,
                    reinterpret_cast<float*>(keys));
  }

  void zip_values(std::size_t pair, const bfloat16* even, const bfloat16* odd) {
    auto* to = reinterpret_cast<std::uint32_t*>(values) + pair * kMatrixCols;
    for (std::size_t column = 0; column < depth();
         column += kMatrixCols, to += padded_count() / 2 * kMatrixCols) {
      for (std::size_t half = 0; half < kMatrixCols; half += kLanes) {
        const std::size_t at = column + half, left = at < head_dim ? std::min(head_dim - at, kLanes) : 0;
        const auto mask = static_cast<__mmask16>((1U << left) - 1);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + at));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + at));
        _mm512_storeu_si512(to + half, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
};
#endif

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
