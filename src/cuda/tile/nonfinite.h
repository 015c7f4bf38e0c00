#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/warp.h"

/// NaN and infinity in the right operand of a product whose left operand is 0 where a row does not see a key:
/// 0 times either is NaN, so they would reach results that do not depend on them.
namespace moba::cuda::tile {

/// Returns a number that is nonzero if one of a pair is a NaN or an infinity: their exponents, all ones,
/// carry into the sign bits.
template <typename T>
MOBA_DEVICE std::uint32_t nonfinite(std::uint32_t pair) {
  constexpr bool kIsBf16 = std::is_same_v<T, bfloat16>;
  constexpr std::uint32_t kExponents = kIsBf16 ? 0x7F807F80U : 0x7C007C00U,
                          kOnes = kIsBf16 ? 0x00800080U : 0x04000400U;
  return ((pair & kExponents) + kOnes) & 0x80008000U;
}

/// Zeroes the 16-byte vectors of a tile that hold a NaN or an infinity, and calls report(row, whether the row
/// had one) once for each row. Called by `threads` threads, numbered by `thread`, four of which share a row.
template <int threads, int rows, typename Tile, typename Report>
MOBA_DEVICE void isolate_nonfinite(const Tile& tile, int thread, Report&& report) {
  static_assert(rows % 8 == 0 && threads % ptx::kLanes == 0 && Tile::kVecs % 4 == 0);
  using T = typename Tile::Element;
  for (int row = thread / 4; row < rows; row += threads / 4) {
    std::uint32_t found = 0;
    for (int vec = thread % 4; vec < Tile::kVecs; vec += 4) {
      const auto v = *reinterpret_cast<const ptx::Vec16*>(tile.vec(row, vec));
      const std::uint32_t here =
          nonfinite<T>(v.x) | nonfinite<T>(v.y) | nonfinite<T>(v.z) | nonfinite<T>(v.w);
      if (here != 0) ptx::zero_vec(reinterpret_cast<std::byte*>(tile.data), tile.start(row, vec));
      found |= here;
    }
    found |= ptx::shfl_xor(found, 1);
    found |= ptx::shfl_xor(found, 2);
    if (thread % 4 == 0) report(row, found != 0);
  }
}

/// The same; poison[row] becomes NaN for rows that had a NaN or an infinity, else 0. It is added to the left
/// operand where a row of the product sees the key, which gives NaN again.
template <int threads, int rows, typename Tile>
MOBA_DEVICE void isolate_nonfinite(const Tile& tile, int thread, float* poison) {
  isolate_nonfinite<threads, rows>(tile, thread,
                                   [&](int row, bool found) { poison[row] = found ? ptx::nan() : 0; });
}

}  // namespace moba::cuda::tile
