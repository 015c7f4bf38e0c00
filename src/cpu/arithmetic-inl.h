// The two ways in which a tile of attention is computed: in f32, whatever the storage type, or in bf16 where
// the CPU multiplies bf16 matrices itself. Both pack a chunk of keys and values, gather rows, score them, and
// add weighted values to the rows' outputs.
#if defined(MOBA_CPU_ARITHMETIC_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_ARITHMETIC_INL_H_
#undef MOBA_CPU_ARITHMETIC_INL_H_
#else
#define MOBA_CPU_ARITHMETIC_INL_H_
#endif

#include "cpu/matrix_tiles.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

/// Calls visit(index, rows, i) for rows [first, first + count) of a sequence, wherever their pages lie;
/// `fetch(position)` gives the run of rows from there on.
template <typename Fetch, typename Visit>
HWY_INLINE void for_rows(std::int64_t first, std::int64_t count, Fetch&& fetch, Visit&& visit) {
  for (std::int64_t done = 0; done < count;) {
    const Rows rows = fetch(first + done);
    const std::int64_t run = std::min(rows.count, count - done);
    for (std::int64_t i = 0; i < run; ++i) visit(static_cast<std::size_t>(done + i), rows, i);
    done += run;
  }
}

struct Float32 {
  static constexpr std::size_t kHeight = kTileRows;

  TileScratch& tile;
  std::size_t head_dim;
  float* keys;    // [panels(count)][D][kCols]
  float* values;  // [panels(D)][count][kCols]
  std::size_t count = 0;

  void pack(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    Rows rows;
    std::int64_t begin = 0;  // index in the chunk at which `rows` starts
    const auto key = [&](std::size_t i, float* scratch) HWY_ATTR {
      const auto index = static_cast<std::int64_t>(i);
      if (index >= begin + rows.count || index == 0) {
        begin = index;
        rows = problem.keys(sequence, head, first + index);
      }
      return row_as_f32(rows, problem.k.dtype, index - begin, head_dim, scratch);
    };
    pack_transposed(count, head_dim, key, tile.widened, keys);
    for_rows(
        first, keys_count, [&](std::int64_t at) { return problem.values(sequence, head, at); },
        [&](std::size_t index, const Rows& from, std::int64_t i)
            HWY_ATTR { pack_value(index, row_as_f32(from, problem.v.dtype, i, head_dim, tile.widened)); });
  }

  void gather(std::size_t r, const std::byte* query, DType dtype, float sign) {
    widen(query, dtype, head_dim, sign, tile.rows + r * kRowStride);
  }

  /// `between()` is called before every panel.
  template <typename Between>
  void score(std::size_t rows, std::size_t columns, Between&& between) {
    for (std::size_t panel = 0; panel < panels(columns); ++panel) {
      between();
      kScoreTiles[rows - 1](tile.rows, keys + panel * head_dim * kCols, head_dim,
                            tile.scores + panel * kCols);
    }
  }

  /// The weights stand where the scores were.
  void store_weights(std::size_t r, std::size_t column, Vec left, Vec right) {
    float* to = tile.scores + r * kScoreStride + column;
    hn::Store(left, F32(), to);
    hn::Store(right, F32(), to + kLanes);
  }

  template <typename Between>
  void add_values(std::size_t rows, std::size_t columns, Between&& between) {
    for (std::size_t panel = 0; panel < panels(head_dim); ++panel) {
      between();
      kValueTiles[rows - 1](tile.scores, values + panel * count * kCols, columns, tile.decay, tile.out,
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
  static constexpr std::size_t kHeight = kMaxTileRows;
  /// A product of all panels is one call: what is fetched between panels elsewhere is fetched before it.
  static constexpr int kFetches = 4;

  TileScratch& tile;
  std::size_t head_dim;
  bfloat16* keys;    // [count / 32][depth / 2][32][2], depth = D rounded up to 32
  bfloat16* values;  // [depth / 32][count / 2][32][2]
  std::size_t count = 0;

  const Bf16Tiles& tiles = *bf16_tiles();

  std::size_t depth() const { return round_up(head_dim, kBf16Depth); }
  std::size_t padded_count() const { return round_up(count, kBf16Depth); }

  void pack(const Problem& problem, const SequenceView& sequence, std::int64_t head, std::int64_t first,
            std::int64_t keys_count) {
    count = static_cast<std::size_t>(keys_count);
    pack_keys(problem, sequence, head, first, keys_count);
    auto* zeros = reinterpret_cast<bfloat16*>(tile.widened + kMaxLanes * kMaxHeadDim);
    const bfloat16* even = nullptr;
    const auto value = [&](std::size_t index, const bfloat16* row) HWY_ATTR {
      if (index % 2 == 0) {
        even = row;
      } else {
        zip_values(index / 2, even, row);
      }
    };
    for_rows(
        first, keys_count, [&](std::int64_t at) { return problem.values(sequence, head, at); },
        [&](std::size_t index, const Rows& from, std::int64_t i)
            HWY_ATTR { value(index, reinterpret_cast<const bfloat16*>(from.data) + i * from.stride); });
    for (std::size_t index = count; index < padded_count(); ++index) value(index, zeros);
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
      for (int i = 0; i < kFetches; ++i) between();
      tiles.multiply(from + first * kRowStride, kRowStride, n, keys, depth() * kNarrowCols,
                     round_up(columns, kNarrowCols), depth(), tile.scores + first * kScoreStride,
                     kScoreStride);
    });
  }

  void store_weights(std::size_t r, std::size_t column, Vec left, Vec right) {
    // vcvtneps2bf16 is not in every AVX-512 CPU that has AMX's neighbours, so: nearest, ties to even, in
    // integers. Weights are no NaN unless their row is lost anyway.
    const __m256i low = round(left), high = round(right);
    auto* to = reinterpret_cast<std::uint16_t*>(tile.weights) + r * kWeightStride + column;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes), high);
  }

  template <typename Between>
  void add_values(std::size_t rows, std::size_t columns, Between&& between) {
    const auto* from = reinterpret_cast<const bfloat16*>(tile.weights);
    for_tiles(rows, [&](std::size_t first, std::size_t n) HWY_ATTR {
      for (int i = 0; i < kFetches; ++i) between();
      tiles.multiply(from + first * kWeightStride, kWeightStride, n, values, padded_count() * kNarrowCols,
                     depth(), round_up(columns, kBf16Depth), tile.product + first * kRowStride, kRowStride);
    });
    const F32 d;
    for (std::size_t r = 0; r < rows; ++r) {
      const Vec keep = hn::Set(d, tile.decay[r]);
      const float* product = tile.product + r * kRowStride;
      float* out = tile.out[r];
      for (std::size_t i = 0; i < depth(); i += kLanes) {
        hn::Store(hn::MulAdd(keep, hn::Load(d, out + i), hn::Load(d, product + i)), d, out + i);
      }
    }
  }

 private:
  static __m256i round(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.raw);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  template <typename Tile>
  void for_tiles(std::size_t rows, Tile&& multiply) {
    for (std::size_t first = 0; first < rows; first += tiles.rows)
      multiply(first, std::min(tiles.rows, rows - first));
  }

  /// A pair of bf16 is moved like one float.
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
    pack_transposed(static_cast<std::size_t>(keys_count), depth() / 2, key, tile.widened,
                    reinterpret_cast<float*>(keys));
  }

  void zip_values(std::size_t pair, const bfloat16* even, const bfloat16* odd) {
    auto* to = reinterpret_cast<std::uint32_t*>(values) + pair * kNarrowCols;
    for (std::size_t column = 0; column < depth();
         column += kNarrowCols, to += padded_count() / 2 * kNarrowCols) {
      for (std::size_t half = 0; half < kNarrowCols; half += kLanes) {
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
