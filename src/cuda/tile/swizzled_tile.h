#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mma.h"

namespace moba::cuda::tile {

/// Elements of a vec, which is what one thread copies and one row of a hardware tile holds: 16 bytes.
constexpr int kVecElements = 8;

/// Rows of `head_dim` 16-bit elements in shared memory. The vecs of a row are swizzled so that the same
/// vec of eight rows in succession, as a hardware tile wants it, lies in all 32 banks.
template <typename T, int head_dim>
struct SwizzledTile {
  static constexpr int kVecs = head_dim / kVecElements;
  static constexpr int kSwizzle = kVecs % 8 == 0 ? 8 : 4;
  static_assert(kVecs % kSwizzle == 0);

  T* data;

  /// Bytes from `data` to vec `known` + `index` of a row, `known` being known to the compiler and a
  /// multiple of the least power of 2 above `index`: then one of few offsets of the lane's own and a
  /// constant.
  MOBA_DEVICE static std::uint32_t offset(int row, int known, int index) {
    const int mask = kSwizzle == 8 ? row & 7 : row >> 1 & 3;
    const int swizzled = index ^ mask ^ (known & (kSwizzle - 1));
    return static_cast<std::uint32_t>(row * head_dim * 2 + swizzled * 16 + known / kSwizzle * kSwizzle * 16);
  }
  /// Bytes from `data` to a vec of a row.
  MOBA_DEVICE static std::uint32_t start(int row, int index) {
    const int mask = kSwizzle == 8 ? row & 7 : row >> 1 & 3;
    return static_cast<std::uint32_t>(row * head_dim * 2 + (index ^ mask) * 16);
  }
  MOBA_DEVICE T* vec(int row, int index) const { return data + start(row, index) / 2; }
};

/// Which vecs a thread copies: always the same one of every so many rows, a multiple of 8 so that the
/// permutation is the same too, and no address has to be kept for each.
template <int rows, int threads, int head_dim>
struct Share {
  static constexpr int kVecs = head_dim / kVecElements;
  static constexpr int kStep = threads / kVecs / 8 * 8;
  static_assert(kStep > 0);
  static constexpr int kSteps = (rows + kStep - 1) / kStep;

  MOBA_DEVICE static int row() { return ptx::thread() / kVecs; }
  MOBA_DEVICE static int vec() { return ptx::thread() % kVecs; }
  MOBA_DEVICE static bool is_mine(int row) { return ptx::thread() < kStep * kVecs && row < rows; }
};

/// Begins to load rows that lie `stride` elements apart, the first at `from`; zeros from row `valid` on.
template <int rows, int threads, typename T, int head_dim>
MOBA_DEVICE void load_rows(const SwizzledTile<T, head_dim>& to, const T* from, std::int64_t stride,
                           std::int32_t valid) {
  using S = Share<rows, threads, head_dim>;
  from += S::row() * stride + S::vec() * kVecElements;
  MOBA_UNROLL
  for (int i = 0; i < S::kSteps; ++i) {
    const int row = S::row() + i * S::kStep;
    if (S::is_mine(row)) ptx::cp_async_16(to.data, to.start(row, S::vec()), from, row < valid);
    from += S::kStep * stride;
  }
}

/// The same of rows from anywhere: `source(row)` is where row's elements are, null for a row of zeros.
template <int rows, int threads, typename T, int head_dim, typename Source>
MOBA_DEVICE void gather_rows(const SwizzledTile<T, head_dim>& to, Source&& source) {
  using S = Share<rows, threads, head_dim>;
  MOBA_UNROLL
  for (int i = 0; i < S::kSteps; ++i) {
    const int row = S::row() + i * S::kStep;
    if (!S::is_mine(row)) continue;
    const T* from = source(row);
    ptx::cp_async_16(to.data, to.start(row, S::vec()),
                     from == nullptr ? from : from + S::vec() * kVecElements, from != nullptr);
  }
}

/// Operands of ptx::mma_m16n8k16 out of shared memory, at step `k` of 16 elements.
/// Left: rows [row, row + 16).
template <typename T, int head_dim>
MOBA_DEVICE void load_a(std::uint32_t (&a)[4], const SwizzledTile<T, head_dim>& from, int row, int k,
                        int lane) {
  ptx::ldmatrix_x4(a, from.data, from.offset(row + lane % 16, 2 * k, lane / 16));
}

/// Right, for products with rows: rows [row, row + 16) are two tiles' columns, b[0..1] and b[2..3].
template <typename T, int head_dim>
MOBA_DEVICE void load_b(std::uint32_t (&b)[4], const SwizzledTile<T, head_dim>& from, int row, int k,
                        int lane) {
  ptx::ldmatrix_x4(b, from.data, from.offset(row + lane % 8 + lane / 16 * 8, 2 * k, lane / 8 % 2));
}

/// Right, for sums over rows [row, row + 16): vecs `vec` and `vec` + 1 are two tiles' columns.
template <typename T, int head_dim>
MOBA_DEVICE void load_b_trans(std::uint32_t (&b)[4], const SwizzledTile<T, head_dim>& from, int row, int vec,
                              int lane) {
  ptx::ldmatrix_x4_trans(b, from.data, from.offset(row + lane % 16, vec, lane / 16));
}

/// sums[tiles of 16 rows][tiles of 8 columns] += left right^T: products of rows [left_row, ...) with rows
/// [0, columns). Element r of a tile is of row lane / 4 + r / 2 * 8 and column lane % 4 * 2 + r % 2.
template <typename T, int head_dim, int row_tiles, int column_tiles>
MOBA_DEVICE void gemm_nt(float (&sums)[row_tiles][column_tiles][4], const SwizzledTile<T, head_dim>& left,
                         int left_row, const SwizzledTile<T, head_dim>& right) {
  const int lane = ptx::lane();
  MOBA_UNROLL
  for (int k = 0; k < head_dim / 16; ++k) {
    std::uint32_t a[row_tiles][4];
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) load_a(a[i], left, left_row + 16 * i, k, lane);
    MOBA_UNROLL
    for (int j = 0; j < column_tiles; j += 2) {
      std::uint32_t b[4];
      load_b(b, right, 8 * j, k, lane);
      MOBA_UNROLL
      for (int i = 0; i < row_tiles; ++i) {
        ptx::mma_m16n8k16<T>(sums[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

/// sums[tiles of 16 rows][tiles of 8 columns] += weights rows, for as many columns as there are sums, from
/// vec `first_vec` on. `weights`, one for each of the sums' rows and of `rows`, are as products come.
template <typename T, int head_dim, int row_tiles, int weight_tiles, int column_tiles>
MOBA_DEVICE void gemm_rs(float (&sums)[row_tiles][column_tiles][4],
                         const float (&weights)[row_tiles][weight_tiles][4],
                         const SwizzledTile<T, head_dim>& rows, int first_vec = 0) {
  const int lane = ptx::opaque(ptx::lane());
  MOBA_UNROLL
  for (int k = 0; k < weight_tiles / 2; ++k) {
    std::uint32_t a[row_tiles][4];
    MOBA_UNROLL
    for (int i = 0; i < row_tiles; ++i) {
      MOBA_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float(&w)[4] = weights[i][2 * k + r / 2];
        a[i][r] = ptx::pack<T>(w[r % 2 * 2], w[r % 2 * 2 + 1]);
      }
    }
    MOBA_UNROLL
    for (int j = 0; j < column_tiles; j += 2) {
      std::uint32_t b[4];
      load_b_trans(b, rows, 16 * k, first_vec + j, lane);
      MOBA_UNROLL
      for (int i = 0; i < row_tiles; ++i) {
        ptx::mma_m16n8k16<T>(sums[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

}  // namespace moba::cuda::tile
