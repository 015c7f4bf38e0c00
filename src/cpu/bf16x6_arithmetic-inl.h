// Tile arithmetic of f32 on bf16 matrix instructions: F32AsBf16x6.
#if defined(MOBA_CPU_BF16X6_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_BF16X6_ARITHMETIC_INL_H_
#undef MOBA_CPU_BF16X6_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_BF16X6_ARITHMETIC_INL_H_
#endif

#include <tuple>

#include "cpu/bf16x6-inl.h"
#include "cpu/matrix_tiles.h"
#include "cpu/tile_arithmetic-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
/// f32 on bf16 matrix instructions (bf16x6-inl.h). Non-finite keys, values and rows are found while they are
/// packed and are multiplied in plain f32.
struct F32AsBf16x6 {
  static constexpr std::size_t kHeight = kMaxTileRows, kMaxKeys = kKeyTileSize;
  static constexpr bool kEqualTiles = false;  // a tile of 17 rows costs what one of 32 does
  static constexpr bool kPrefetchesRows = true;
  static constexpr std::size_t kWords = kPairWords, kParts = kMaxParts;
  /// Keys whose weights, three parts of 32 rows, stay in the first-level cache while the values pass by.
  static constexpr std::size_t kResidentKeys = 128;

  TileScratch& tile;
  std::size_t head_dim;
  std::uint32_t* keys;    // [count / 32][part][depth / 2][32]
  std::uint32_t* values;  // [depth / 32][part][count / 2][32]
  std::size_t count = 0;
  KvSource source{};
  KeySet nonfinite_keys{}, nonfinite_values{};
  std::uint32_t nonfinite_rows = 0;             // one bit per row
  std::array<const float*, kHeight> queries{};  // addresses of the gathered rows
  const Bf16x6Tiles& tiles = *bf16x6_tiles();
  RowPrefetcher prefetcher{};
  std::array<const std::byte*, 2 * kHeight> next_rows{};

  static constexpr std::size_t kRowPart = kTileCapacity * kBf16RowStride,
                               kWeightPart = kTileCapacity * kWeightStride;

  std::size_t depth() const { return round_up(head_dim, kBf16Depth); }
  std::size_t padded_count() const { return round_up(count, kBf16Depth); }
  std::size_t key_part() const { return depth() / 2 * kMatrixCols; }  // words
  std::size_t value_part() const { return padded_count() / 2 * kMatrixCols; }

  void pack(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&call, &sequence, head, first, keys_count};
    pack_keys();
    pack_values();
  }

  /// Starts prefetching the rows of the next tile: row(r) returns the addresses of its query and its output.
  template <typename Row>
  void begin_prefetch(std::size_t rows, std::size_t bytes, Row&& row) {
    for (std::size_t r = 0; r < rows; ++r) std::tie(next_rows[2 * r], next_rows[2 * r + 1]) = row(r);
    prefetcher.begin(next_rows.data(), 2 * rows, bytes);
  }

  void gather(std::size_t r, const std::byte* query, DType dtype, float sign) {
    if (r == 0) nonfinite_rows = 0;
    const float* row = tile.rows + r * kRowStride;
    if (dtype == DType::f32 && sign == 1.0F) {
      row = reinterpret_cast<const float*>(query);
    } else {
      load_f32(query, dtype, head_dim, sign, tile.rows + r * kRowStride);
    }
    queries[r] = row;
    split_row_bf16x3(row, head_dim, reinterpret_cast<std::uint32_t*>(tile.bf16_rows + r * kBf16RowStride),
                     kRowPart / 2);
    if (!all_finite(row, head_dim)) nonfinite_rows |= 1U << r;
  }

  template <typename Between>
  void score(std::size_t rows, std::size_t columns, Between&& between) {
    const std::size_t panel_stride = kParts * key_part();
    for (std::size_t column = 0; column < columns; column += kMatrixCols) {
      between();
      tiles.multiply(reinterpret_cast<const bfloat16*>(tile.bf16_rows), kBf16RowStride, kRowPart, rows,
                     reinterpret_cast<const bfloat16*>(keys + column / kMatrixCols * panel_stride),
                     key_part() * 2, depth(), false, tile.scores + column, kScoreStride, prefetcher);
    }
    if (nonfinite_keys.any() || nonfinite_rows != 0) score_nonfinite(rows);
  }

  void store_weights(std::size_t r, std::size_t column, Vec left, Vec right) {
    __m512i words[kParts];
    split_bf16x3(left, right, words);
    for (std::size_t part = 0; part < kParts; ++part) {
      _mm512_storeu_si512(tile.weights + part * kWeightPart + r * kWeightStride + column, words[part]);
    }
  }

  float weight(std::size_t r, std::size_t column) const {
    const std::size_t in_words = column % kBf16Depth,
                      at = column - in_words + in_words % kWords * 2 + in_words / kWords;
    float sum = 0;
    for (std::size_t part = 0; part < kParts; ++part)
      sum += float_of(bfloat16{tile.weights[part * kWeightPart + r * kWeightStride + at]});
    return sum;
  }

  template <typename Between>
  void add_values(std::size_t rows, std::size_t columns, Between&& between) {
    const std::size_t all = round_up(columns, kBf16Depth);
    for (std::size_t first = 0; first < all; first += kResidentKeys) {
      for (std::size_t column = 0; column < depth(); column += kMatrixCols) {
        between();
        const std::uint32_t* panel =
            values + column / kMatrixCols * kParts * value_part() + first / 2 * kMatrixCols;
        tiles.multiply(reinterpret_cast<const bfloat16*>(tile.weights) + first, kWeightStride, kWeightPart,
                       rows, reinterpret_cast<const bfloat16*>(panel), value_part() * 2,
                       std::min(kResidentKeys, all - first), first > 0, tile.product + column, kRowStride,
                       prefetcher);
      }
    }
    const F32 d;
    for (std::size_t r = 0; r < rows; ++r) {
      const Vec keep = hn::Set(d, tile.rescale[r]);
      const float* product = tile.product + r * kRowStride;
      float* out = tile.out[r];
      for (std::size_t i = 0; i < depth(); i += kLanes)
        hn::Store(hn::MulAdd(keep, hn::Load(d, out + i), hn::Load(d, product + i)), d, out + i);
    }
  }

 private:
  void pack_keys() {
    constexpr std::size_t kRowWords = kMaxHeadDim / 2;
    nonfinite_keys.reset();
    const auto transpose = [&](std::size_t first) HWY_ATTR {
      transpose_bf16x3(tile.words, kRowWords, depth(),
                       keys + first / kMatrixCols * kParts * key_part() + first % kMatrixCols, key_part());
    };
    source.for_keys([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const float* key = row_as_f32(from, source.call->k.dtype, i, head_dim, tile.f32_rows);
      nonfinite_keys[index] = !all_finite(key, head_dim);
      split_row_bf16x3(key, head_dim, tile.words + index % kLanes * kRowWords, kLanes * kRowWords);
      if (index % kLanes == kLanes - 1) transpose(index - (kLanes - 1));
    });
    // Columns after the last key are scored, too, and ignored: any finite value will do.
    if (count % kLanes != 0) transpose(count / kLanes * kLanes);
  }

  void pack_values() {
    const float* zeros = tile.f32_rows + kMaxLanes * kMaxHeadDim;
    nonfinite_values.reset();
    std::array<const float*, kBf16Depth> rows;
    const auto zip = [&](std::size_t first) HWY_ATTR {
      zip_rows(rows.data(), head_dim, values + first / 2 * kMatrixCols, kParts * value_part(), value_part());
    };
    source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const std::size_t at = index % kBf16Depth;
      rows[at] = row_as_f32(from, source.call->v.dtype, i, head_dim, tile.rows + at * kRowStride);
      nonfinite_values[index] = !all_finite(rows[at], head_dim);
      if (nonfinite_values[index]) rows[at] = zeros;
      if (at == kBf16Depth - 1) zip(index - at);
    });
    if (const std::size_t left = count % kBf16Depth; left != 0) {
      std::fill(rows.begin() + left, rows.end(), zeros);
      zip(count - left);
    }
  }

  /// Overwrites the scores of non-finite keys and rows, which a product of parts cannot compute.
  void score_nonfinite(std::size_t rows) {
    source.for_keys([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const float* key = row_as_f32(from, source.call->k.dtype, i, head_dim, tile.f32_rows);
      for (std::size_t r = 0; r < rows; ++r) {
        if (!nonfinite_keys[index] && (nonfinite_rows >> r & 1U) == 0) continue;
        float sum = 0;
        for (std::size_t c = 0; c < head_dim; ++c) sum += queries[r][c] * key[c];
        tile.scores[r * kScoreStride + index] = sum;
      }
    });
  }
};
#endif

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
