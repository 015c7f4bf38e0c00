// Tile arithmetics: Float32 (f32 multiply-adds, whatever the storage type), BFloat16 (bf16 matrix
// instructions) and F32AsBf16x6 (f32 on bf16 matrix instructions, each value split into three bf16 parts).
// Each packs a key tile with its values, gathers query rows, computes their scores, and accumulates the
// weighted values into the rows' outputs.
#if defined(MOBA_CPU_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_ARITHMETIC_INL_H_
#undef MOBA_CPU_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_ARITHMETIC_INL_H_
#endif

#include <bitset>
#include <cmath>
#include <tuple>

#include "cpu/bf16x6-inl.h"
#include "cpu/matrix_tiles.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Calls visit(index, rows, i) for rows [first, first + count) of a sequence, page by page; `fetch(position)`
/// returns the contiguous rows that start there.
template <typename Fetch, typename Visit>
HWY_INLINE void for_rows(std::int64_t first, std::int64_t count, Fetch&& fetch, Visit&& visit) {
  for (std::int64_t done = 0; done < count;) {
    const Rows rows = fetch(first + done);
    const std::int64_t run = std::min(rows.count, count - done);
    for (std::int64_t i = 0; i < run; ++i) visit(static_cast<std::size_t>(done + i), rows, i);
    done += run;
  }
}

/// Location of a key tile's keys and values in the call's tensors or pages.
struct KvSource {
  const Problem* problem = nullptr;
  const SequenceView* sequence = nullptr;
  std::int64_t head = 0, first = 0, count = 0;

  template <typename Visit>
  HWY_INLINE void for_keys(Visit&& visit) const {
    for_rows(
        first, count, [&](std::int64_t at) { return problem->keys(*sequence, head, at); }, visit);
  }
  template <typename Visit>
  HWY_INLINE void for_values(Visit&& visit) const {
    for_rows(
        first, count, [&](std::int64_t at) { return problem->values(*sequence, head, at); }, visit);
  }
};

/// A set of keys, by their index in the key tile.
using KeySet = std::bitset<kKeyTileSize>;

/// Adds weight(r, i) * value i to out[r] for the non-finite values, only in the rows that see them. In a
/// product of tiles a non-finite value would reach every row, because 0 * inf is NaN.
template <typename Weight>
void add_nonfinite_values(const KvSource& source, const KeySet& nonfinite, TileScratch& tile,
                          std::size_t rows, std::size_t head_dim, Weight&& weight) {
  source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
    if (!nonfinite.test(index)) return;
    const float* value = row_as_f32(from, source.problem->v.dtype, i, head_dim, tile.f32_rows);
    for (std::size_t r = 0; r < rows; ++r) {
      const float by = index < tile.visible[r] ? weight(r, index) : 0.0F;
      for (std::size_t c = 0; c < head_dim && index < tile.visible[r]; ++c) tile.out[r][c] += by * value[c];
    }
  });
}

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

  void pack(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&problem, &sequence, head, first, keys_count};
    Rows rows;
    std::int64_t begin = 0;  // index in the key tile at which `rows` starts
    const auto key = [&](std::size_t i, float* scratch) HWY_ATTR {
      const auto index = static_cast<std::int64_t>(i);
      if (index >= begin + rows.count || index == 0) {
        begin = index;
        rows = problem.keys(sequence, head, first + index);
      }
      return row_as_f32(rows, problem.k.dtype, index - begin, head_dim, scratch);
    };
    pack_transposed(count, head_dim, key, tile.f32_rows, keys);
    nonfinite_values.reset();
    source.for_values([&](std::size_t index, const Rows& from, std::int64_t i) HWY_ATTR {
      const float* row = row_as_f32(from, problem.v.dtype, i, head_dim, tile.f32_rows);
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

  void pack(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&problem, &sequence, head, first, keys_count};
    pack_keys(problem, sequence, head, first, keys_count);
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
      const auto* row = reinterpret_cast<const bfloat16*>(from.data) + i * from.stride;
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
    // Weights are no NaN unless their row is lost anyway.
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

  /// Packs the keys; a pair of bf16 values is moved as one float.
  void pack_keys(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
                 std::int64_t keys_count) {
    Rows rows;
    std::int64_t begin = 0;
    const bool whole = head_dim % kBf16Depth == 0;
    const auto key = [&](std::size_t i, float* scratch) HWY_ATTR -> const float* {
      const auto index = static_cast<std::int64_t>(i);
      if (index >= begin + rows.count || index == 0) {
        begin = index;
        rows = problem.keys(sequence, head, first + index);
      }
      const std::byte* from = rows.data + (index - begin) * rows.stride * 2;
      if (whole) return reinterpret_cast<const float*>(from);
      std::memcpy(scratch, from, head_dim * 2);
      std::memset(reinterpret_cast<std::byte*>(scratch) + head_dim * 2, 0, (depth() - head_dim) * 2);
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

  void pack(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    source = {&problem, &sequence, head, first, keys_count};
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
      const float* key = row_as_f32(from, source.problem->k.dtype, i, head_dim, tile.f32_rows);
      nonfinite_keys[index] = !all_finite(key, head_dim);
      split_row_bf16x3(key, head_dim, tile.words + index % kLanes * kRowWords, kLanes * kRowWords);
      if (index % kLanes == kLanes - 1) transpose(index - (kLanes - 1));
    });
    // What follows the last key is scored too, and then ignored: any finite value will do.
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
      rows[at] = row_as_f32(from, source.problem->v.dtype, i, head_dim, tile.rows + at * kRowStride);
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
      const float* key = row_as_f32(from, source.problem->k.dtype, i, head_dim, tile.f32_rows);
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
