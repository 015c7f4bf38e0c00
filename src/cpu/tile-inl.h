// Compiled once per instruction set: the register tile from which scores, values and the gate are computed,
// packing into panels, and conversion to and from f32. docs/performance.md derives the shape of the tile.
#if defined(MOBA_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOBA_CPU_TILE_INL_H_
#undef MOBA_CPU_TILE_INL_H_
#else
#define MOBA_CPU_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "call.h"
#include "cpu/sizes.h"
#include "exp2-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moba::cpu::HWY_NAMESPACE {
namespace {

constexpr std::size_t kLanes = hn::MaxLanes(F32());
/// Columns of a panel: two vectors, so that each broadcast row element feeds two multiply-adds.
constexpr std::size_t kCols = 2 * kLanes;
/// Rows of a tile: as many accumulators as the register file holds beside the panel's two vectors and the
/// broadcast.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr std::size_t kTileRows = 14;
#else
constexpr std::size_t kTileRows = 6;
#endif

/// Without conversion instructions Highway 1.0 cuts f16 off instead of rounding it, and knows no infinity:
/// one value at a time then.
constexpr bool kConvertsF16 = HWY_TARGET != HWY_SCALAR;

constexpr std::size_t panels(std::size_t columns) {
  return (columns + kCols - 1) / kCols;
}

/// Every row r of `rows` [kRows, stride kStride] times `panel` [depth, kCols], handed to `done(r, left,
/// right)`. Elements of a row are kStep apart, rows of the panel kPanelStride. Each row's sum runs over the
/// depth in ascending order whatever kRows is, so results do not depend on how rows are grouped into tiles.
template <std::size_t kRows, std::size_t kStride, std::size_t kStep = 1, std::size_t kPanelStride = kCols,
          typename Done>
HWY_INLINE void multiply(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT panel, std::size_t depth,
                         Done&& done) {
  const F32 d;
  Vec left[kRows], right[kRows];
#pragma GCC unroll 16
  for (std::size_t r = 0; r < kRows; ++r) left[r] = right[r] = hn::Zero(d);
#pragma GCC unroll 4
  for (std::size_t i = 0; i < depth; ++i) {
    const Vec b0 = hn::Load(d, panel + i * kPanelStride), b1 = hn::Load(d, panel + i * kPanelStride + kLanes);
#pragma GCC unroll 16
    for (std::size_t r = 0; r < kRows; ++r) {
      const Vec a = hn::Set(d, rows[r * kStride + i * kStep]);
      left[r] = hn::MulAdd(a, b0, left[r]);
      right[r] = hn::MulAdd(a, b1, right[r]);
    }
  }
#pragma GCC unroll 16
  for (std::size_t r = 0; r < kRows; ++r) done(r, left[r], right[r]);
}

/// scores[r][0, kCols) = rows[r] . panel
template <std::size_t kRows>
HWY_NOINLINE void score_tile(const float* HWY_RESTRICT rows, const float* HWY_RESTRICT panel,
                             std::size_t depth, float* HWY_RESTRICT scores) {
  multiply<kRows, kRowStride>(rows, panel, depth, [&](std::size_t r, Vec left, Vec right) HWY_ATTR {
    hn::Store(left, F32(), scores + r * kScoreStride);
    hn::Store(right, F32(), scores + r * kScoreStride + kLanes);
  });
}

/// out[r][0, kCols) = decay[r] * out[r] + weights[r] . panel
template <std::size_t kRows>
HWY_NOINLINE void value_tile(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT panel,
                             std::size_t depth, const float* HWY_RESTRICT rescale,
                             float* const* HWY_RESTRICT out, std::size_t column) {
  multiply<kRows, kScoreStride>(weights, panel, depth, [&](std::size_t r, Vec left, Vec right) HWY_ATTR {
    const F32 d;
    const Vec keep = hn::Set(d, rescale[r]);
    float* to = out[r] + column;
    hn::Store(hn::MulAdd(keep, hn::Load(d, to), left), d, to);
    hn::Store(hn::MulAdd(keep, hn::Load(d, to + kLanes), right), d, to + kLanes);
  });
}

/// out[k][0, kCols) += sum over rows r of weights[r][k] * rows[r][0, kCols): the transposed product.
template <std::size_t kKeys>
HWY_NOINLINE void key_grad_tile(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT rows,
                                std::size_t depth, float* HWY_RESTRICT out, std::size_t stride) {
  multiply<kKeys, 1, kScoreStride, kRowStride>(
      weights, rows, depth, [&](std::size_t k, Vec left, Vec right) HWY_ATTR {
        const F32 d;
        float* to = out + k * stride;
        hn::Store(hn::Add(hn::Load(d, to), left), d, to);
        hn::Store(hn::Add(hn::Load(d, to + kLanes), right), d, to + kLanes);
      });
}

using ScoreTile = void (*)(const float*, const float*, std::size_t, float*);
using ValueTile = void (*)(const float*, const float*, std::size_t, const float*, float* const*, std::size_t);
using KeyGradTile = void (*)(const float*, const float*, std::size_t, float*, std::size_t);

template <std::size_t... kRows>
constexpr std::array<ScoreTile, sizeof...(kRows)> score_tiles(std::index_sequence<kRows...>) {
  return {score_tile<kRows + 1>...};
}
template <std::size_t... kRows>
constexpr std::array<ValueTile, sizeof...(kRows)> value_tiles(std::index_sequence<kRows...>) {
  return {value_tile<kRows + 1>...};
}
template <std::size_t... kKeys>
constexpr std::array<KeyGradTile, sizeof...(kKeys)> key_grad_tiles(std::index_sequence<kKeys...>) {
  return {key_grad_tile<kKeys + 1>...};
}
/// By the number of rows, less one.
constexpr auto kScoreTiles = score_tiles(std::make_index_sequence<kTileRows>());
constexpr auto kValueTiles = value_tiles(std::make_index_sequence<kTileRows>());

/// min(x, 0), NaN stays NaN. A weight recomputed from its saved LSE is at most 1; rounding of large logits
/// would make it larger, without bound.
HWY_INLINE Vec at_most_zero(Vec x) {
  const Vec zero = hn::Zero(F32());
  return HWY_TARGET == HWY_SCALAR ? hn::IfThenElse(hn::Gt(x, zero), zero, x) : hn::Min(zero, x);
}

/// Loads one row of `size` values of storage type `dtype`, times `factor`, as f32.
HWY_INLINE void load_f32(const std::byte* from, DType dtype, std::size_t size, float factor,
                         float* HWY_RESTRICT to) {
  const F32 d;
  const Vec by = hn::Set(d, factor);
  std::size_t i = 0;
  switch (dtype) {
    case DType::f32: {
      const auto* row = reinterpret_cast<const float*>(from);
      for (; i + kLanes <= size; i += kLanes) hn::StoreU(hn::Mul(by, hn::LoadU(d, row + i)), d, to + i);
      break;
    }
    case DType::bf16: {
      const hn::Rebind<hwy::bfloat16_t, F32> half;
      const auto* row = reinterpret_cast<const hwy::bfloat16_t*>(from);
      for (; i + kLanes <= size; i += kLanes) {
        hn::StoreU(hn::Mul(by, hn::PromoteTo(d, hn::LoadU(half, row + i))), d, to + i);
      }
      break;
    }
    case DType::f16: {
      const hn::Rebind<hwy::float16_t, F32> half;
      const auto* row = reinterpret_cast<const hwy::float16_t*>(from);
      for (; kConvertsF16 && i + kLanes <= size; i += kLanes) {
        hn::StoreU(hn::Mul(by, hn::PromoteTo(d, hn::LoadU(half, row + i))), d, to + i);
      }
      break;
    }
    case DType::i8: {
      const hn::Rebind<std::int8_t, F32> byte;
      const hn::RebindToSigned<F32> whole;
      const auto* row = reinterpret_cast<const std::int8_t*>(from);
      for (; i + kLanes <= size; i += kLanes) {
        hn::StoreU(hn::Mul(by, hn::ConvertTo(d, hn::PromoteTo(whole, hn::LoadU(byte, row + i)))), d, to + i);
      }
      break;
    }
    case DType::f64:
      break;  // rejected by the argument checks
  }
  for (; i < size; ++i) to[i] = static_cast<float>(load(from, dtype, static_cast<std::int64_t>(i))) * factor;
}

/// Stores `size` values times `factor`, rounded to storage type `dtype` as store() (number.h) rounds.
HWY_INLINE void store_f32(const float* HWY_RESTRICT from, std::size_t size, float factor, DType dtype,
                          std::byte* to) {
  const F32 d;
  const Vec by = hn::Set(d, factor);
  const hn::RebindToUnsigned<F32> bits;
  std::size_t i = 0;
  if (dtype == DType::f32) {
    for (; i + kLanes <= size; i += kLanes)
      hn::StoreU(hn::Mul(by, hn::LoadU(d, from + i)), d, reinterpret_cast<float*>(to) + i);
  } else if (dtype == DType::bf16) {
    const hn::Rebind<std::uint16_t, F32> half;
    for (; i + kLanes <= size; i += kLanes) {
      const Vec x = hn::Mul(by, hn::LoadU(d, from + i));
      const auto word = hn::BitCast(bits, x), cut = hn::ShiftRight<16>(word);
      const auto odd = hn::And(cut, hn::Set(bits, 1));
      const auto nearest = hn::ShiftRight<16>(hn::Add(word, hn::Add(odd, hn::Set(bits, 0x7FFF))));
      const auto rounded =
          hn::IfThenElse(hn::RebindMask(bits, hn::Eq(x, x)), nearest, hn::Or(cut, hn::Set(bits, 0x40)));
      hn::StoreU(hn::TruncateTo(half, rounded), half, reinterpret_cast<std::uint16_t*>(to) + i);
    }
  } else if (kConvertsF16 && dtype == DType::f16) {
    const hn::Rebind<hwy::float16_t, F32> half;
    const Vec nan = hn::BitCast(d, hn::Set(bits, 0x7FC00000));
    for (; i + kLanes <= size; i += kLanes) {
      const Vec x = hn::Mul(by, hn::LoadU(d, from + i));
      const Vec known = hn::IfThenElse(hn::Eq(x, x), x, hn::CopySign(nan, x));
      hn::StoreU(hn::DemoteTo(half, known), half, reinterpret_cast<hwy::float16_t*>(to) + i);
    }
  }
  for (; i < size; ++i) store(to, dtype, static_cast<std::int64_t>(i), from[i] * factor);
}

/// Returns row `index` of `rows` as f32: in place when it is f32, else converted into `scratch`.
HWY_INLINE const float* row_as_f32(const Rows& rows, DType dtype, std::int64_t index, std::size_t size,
                                   float* scratch) {
  const std::byte* from = rows.data + index * rows.stride * static_cast<std::int64_t>(size_of(dtype));
  if (dtype == DType::f32) return reinterpret_cast<const float*>(from);
  load_f32(from, dtype, size, rows.scales == nullptr ? 1.0F : rows.scales[index], scratch);
  return scratch;
}

/// sum += row
HWY_INLINE void add_row(const float* HWY_RESTRICT row, std::size_t size, float* HWY_RESTRICT sum) {
  const F32 d;
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    hn::StoreU(hn::Add(hn::LoadU(d, sum + i), hn::LoadU(d, row + i)), d, sum + i);
  for (; i < size; ++i) sum[i] += row[i];
}

HWY_INLINE bool all_finite(const float* row, std::size_t size) {
  const F32 d;
  Vec nonfinite = hn::Zero(d);  // becomes NaN at the first non-finite value
  std::size_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    nonfinite = hn::MulAdd(hn::LoadU(d, row + i), hn::Zero(d), nonfinite);
  bool finite = hn::AllTrue(d, hn::Eq(nonfinite, nonfinite));
  for (; i < size; ++i) finite = finite && std::isfinite(row[i]);
  return finite;
}

#if HWY_TARGET != HWY_SCALAR
/// Loads the four floats at from[b] + offset for each 128-bit block b of a vector.
template <class D>
HWY_INLINE hn::Vec<D> load_blocks(D d, const float* const* from, std::size_t offset) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return hn::LoadU(d, from[0] + offset);
  } else {
    const hn::Half<D> half;
    constexpr std::size_t kBlocks = hn::MaxLanes(D()) / 8;
    return hn::Combine(d, load_blocks(half, from + 4 * kBlocks, offset), load_blocks(half, from, offset));
  }
}
#endif

/// Transposes kLanes rows of `depth` floats into columns of a panel: panel[i * kCols + r] = rows[r][i].
HWY_INLINE void transpose_rows(const float* const* rows, std::size_t depth, float* HWY_RESTRICT panel) {
  std::size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const F32 d;
  const hn::Repartition<double, F32> wide;
  for (; i + 4 <= depth; i += 4) {
    const Vec r0 = load_blocks(d, rows, i), r1 = load_blocks(d, rows + 1, i);
    const Vec r2 = load_blocks(d, rows + 2, i), r3 = load_blocks(d, rows + 3, i);
    const auto low01 = hn::BitCast(wide, hn::InterleaveLower(d, r0, r1)),
               high01 = hn::BitCast(wide, hn::InterleaveUpper(d, r0, r1));
    const auto low23 = hn::BitCast(wide, hn::InterleaveLower(d, r2, r3)),
               high23 = hn::BitCast(wide, hn::InterleaveUpper(d, r2, r3));
    float* to = panel + i * kCols;
    hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, low01, low23)), d, to);
    hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, low01, low23)), d, to + kCols);
    hn::Store(hn::BitCast(d, hn::InterleaveLower(wide, high01, high23)), d, to + 2 * kCols);
    hn::Store(hn::BitCast(d, hn::InterleaveUpper(wide, high01, high23)), d, to + 3 * kCols);
  }
#endif
  for (; i < depth; ++i) {
    for (std::size_t r = 0; r < kLanes; ++r) panel[i * kCols + r] = rows[r][i];
  }
}

/// Packs `count` rows, given one by one by row(index, scratch), into panels [panels(count)][depth][kCols]:
/// the transposed operand of score_tile. Columns past the last row are zero, those past `columns` are left as
/// they are. `scratch` holds kLanes rows of kMaxHeadDim, and a zero row after them.
template <typename Row>
HWY_INLINE void pack_transposed(std::size_t count, std::size_t depth, Row&& row, float* scratch,
                                float* HWY_RESTRICT packed, std::size_t columns) {
  const float* zeros = scratch + kLanes * kMaxHeadDim;
  for (std::size_t first = 0; first < columns; first += kLanes) {
    std::array<const float*, kLanes> from;
    for (std::size_t r = 0; r < kLanes; ++r) {
      from[r] = first + r < count ? row(first + r, scratch + r * kMaxHeadDim) : zeros;
    }
    transpose_rows(from.data(), depth, packed + first / kCols * depth * kCols + first % kCols);
  }
}

template <typename Row>
HWY_INLINE void pack_transposed(std::size_t count, std::size_t depth, Row&& row, float* scratch,
                                float* HWY_RESTRICT packed) {
  pack_transposed(count, depth, row, scratch, packed, panels(count) * kCols);
}

}  // namespace
}  // namespace moba::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
