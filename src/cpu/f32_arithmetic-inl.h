// Tile arithmetic of f32 multiply-adds, whatever the storage type.
#if defined(MOBA_CPU_F32_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_F32_ARITHMETIC_INL_H_
#undef MOBA_CPU_F32_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_F32_ARITHMETIC_INL_H_
#endif

#include "cpu/tile_arithmetic-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

struct Float32 {
  static constexpr std::size_t kHeight = kTileRows, kMaxKeys = kKeyTileSize;
  static constexpr bool kEqualTiles = true, kPrefetchesRows = false;

  TileScratch& tile;
  std::size_t head_dim;
  float* keys;    // [panels(count)][D][kCols]
  float* values;  // [panels(D)][count][kCols]
  std::size_t count = 0;
  KvSource source{};
  KeySet nonfinite_values{};  // packed as zeros

  void pack(const Call& call, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&call, &sequence, head, first, keys_count};
    Rows rows;
    std::int64_t begin = 0;  // index in the key tile at which `rows` starts
    const auto key = [&](std::size_t i, float* scratch) HWY_ATTR {
      const auto index = static_cast<std::int64_t>(i);
      if (index >= begin + rows.count || index == 0) {
        begin = index;
        rows = call.keys(sequence, head, first + index);
      }
      return row_as_f32(rows, call.k.dtype, index - begin, head_dim, scratch);
    };
    pack_transposed(count, head_dim, key, tile.f32_rows, keys);
    nonfinite_values.reset();
    source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const float* row = row_as_f32(from, call.v.dtype, i, head_dim, tile.f32_rows);
      nonfinite_values[index] = !all_finite(row, head_dim);
      pack_value(index, nonfinite_values[index] ? tile.f32_rows + kMaxLanes * kMaxHeadDim : row);
    });
  }

  void gather(std::size_t r, const std::byte* query, DType dtype, float sign) {
    load_f32(query, dtype, head_dim, sign, tile.rows + r * kRowStride);
  }
  float weight(std::size_t r, std::size_t column) const { return tile.scores[r * kScoreStride + column]; }

  /// `between()` is called before every panel.
  template <typename Between>
  void score(std::size_t rows, std::size_t columns, Between&& between) {
    for (std::size_t panel = 0; panel < panels(columns); ++panel) {
      between();
      kScoreTiles[rows - 1](tile.rows, keys + panel * head_dim * kCols, head_dim,
                            tile.scores + panel * kCols);
    }
  }

  /// Overwrites the scores with the weights.
  void store_weights(std::size_t r, std::size_t column, Vec left, Vec right) {
    float* to = tile.scores + r * kScoreStride + column;
    hn::Store(left, F32(), to);
    hn::Store(right, F32(), to + kLanes);
  }

  template <typename Between>
  void add_values(std::size_t rows, std::size_t columns, Between&& between) {
    for (std::size_t panel = 0; panel < panels(head_dim); ++panel) {
      between();
      kValueTiles[rows - 1](tile.scores, values + panel * count * kCols, columns, tile.rescale, tile.out,
                            panel * kCols);
    }
  }

 private:
  void pack_value(std::size_t index, const float* row) {
    const F32 d;
    float* to = values + index * kCols;
    std::size_t column = 0;
    for (; column + kCols <= head_dim; column += kCols, to += count * kCols) {
      hn::Store(hn::LoadU(d, row + column), d, to);
      hn::Store(hn::LoadU(d, row + column + kLanes), d, to + kLanes);
    }
    if (column == head_dim) return;
    for (std::size_t i = 0; i < kCols; ++i) to[i] = column + i < head_dim ? row[column + i] : 0.0F;
  }
};

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
