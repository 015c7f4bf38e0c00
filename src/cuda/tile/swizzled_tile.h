#pragma once

#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/warp.h"

namespace moba::cuda::tile {

/// Elements of a 16-byte vector, the unit of copies and of ldmatrix rows.
constexpr int kVecElements = 8;

/// Tile of rows of `head_dim` 16-bit elements in shared memory. The 16-byte vectors of a row are swizzled by
/// XOR, so that the same vector of eight consecutive rows, as ldmatrix reads it, covers all 32 banks.
template <typename T, int head_dim>
struct SwizzledTile {
  using Element = T;
  static constexpr int kVecs = head_dim / kVecElements;
  static constexpr int kSwizzle = kVecs % 8 == 0 ? 8 : 4;
  static_assert(kVecs % kSwizzle == 0);

  T* data;

  /// Byte offset of vector `known` + `index` of a row, where `known` is a compile-time constant and a
  /// multiple of the smallest power of 2 above `index`: the result is one of few offsets per lane plus a
  /// constant.
  MOBA_DEVICE static std::uint32_t offset(int row, int known, int index) {
    const int mask = kSwizzle == 8 ? row & 7 : row >> 1 & 3;
    const int swizzled = index ^ mask ^ (known & (kSwizzle - 1));
    return static_cast<std::uint32_t>(row * head_dim * 2 + swizzled * 16 + known / kSwizzle * kSwizzle * 16);
  }
  /// Byte offset of a vector of a row.
  MOBA_DEVICE static std::uint32_t start(int row, int index) {
    const int mask = kSwizzle == 8 ? row & 7 : row >> 1 & 3;
    return static_cast<std::uint32_t>(row * head_dim * 2 + (index ^ mask) * 16);
  }
  MOBA_DEVICE T* vec(int row, int index) const { return data + start(row, index) / 2; }
};

/// Vectors that a thread copies: the same column of every kStep-th row. kStep is a multiple of 8, so that
/// the swizzle is the same too and needs no address per row.
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

/// Issues cp.async copies of rows that lie `stride` elements apart, the first at `from`; zeros from row
/// `valid` on.
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

/// Issues cp.async copies of scattered rows: `source(row)` points to the elements of a row, null is a row of
/// zeros.
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

/// Issues cp.async copies of 16 rows by one warp: lane r < 16 has the address of row r, null for a row of
/// zeros. All lanes must call.
template <typename T, int head_dim>
MOBA_DEVICE void warp_load_rows(const SwizzledTile<T, head_dim>& to, const T* row_of_lane) {
  constexpr unsigned kVecs = head_dim / kVecElements;
  MOBA_UNROLL
  for (unsigned i = 0; i < 16 * kVecs / ptx::kLanes; ++i) {
    const unsigned index = static_cast<unsigned>(ptx::lane()) + i * ptx::kLanes;
    const auto row = static_cast<int>(index / kVecs), vec = static_cast<int>(index % kVecs);
    const auto address = ptx::shfl(reinterpret_cast<std::uintptr_t>(row_of_lane), row);
    const auto* from = reinterpret_cast<const T*>(address + index % kVecs * kVecElements * sizeof(T));
    ptx::cp_async_16(to.data, to.start(row, vec), from, address != 0);
  }
}

/// A operand of mma_m16n8k16 from rows [row, row + 16), at step `k` of 16 elements.
template <typename T, int head_dim>
MOBA_DEVICE void load_a(std::uint32_t (&a)[4], const SwizzledTile<T, head_dim>& from, int row, int k,
                        int lane) {
  ptx::ldmatrix_x4(a, from.data, from.offset(row + lane % 16, 2 * k, lane / 16));
}

/// B operand for A B^T: rows [row, row + 16) are the columns of two tiles, b[0..1] and b[2..3].
template <typename T, int head_dim>
MOBA_DEVICE void load_b(std::uint32_t (&b)[4], const SwizzledTile<T, head_dim>& from, int row, int k,
                        int lane) {
  ptx::ldmatrix_x4(b, from.data, from.offset(row + lane % 8 + lane / 16 * 8, 2 * k, lane / 8 % 2));
}

/// B operand for A B over rows [row, row + 16): vectors `vec` and `vec` + 1 are the columns of two tiles.
template <typename T, int head_dim>
MOBA_DEVICE void load_b_trans(std::uint32_t (&b)[4], const SwizzledTile<T, head_dim>& from, int row, int vec,
                              int lane) {
  ptx::ldmatrix_x4_trans(b, from.data, from.offset(row + lane % 16, vec, lane / 16));
}

/// Computes sums += A B^T of rows [left_row, ...) of `left` with rows [0, columns) of `right`. Element r of
/// a tile is in row lane / 4 + r / 2 * 8 and column lane % 4 * 2 + r % 2.
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

/// The same with A in registers, as load_a loads them for each step of 16 elements, and rows
/// [right_row, right_row + columns) of `right`.
template <typename T, int head_dim, int row_tiles, int column_tiles>
MOBA_DEVICE void gemm_nt(float (&sums)[row_tiles][column_tiles][4],
                         const std::uint32_t (&left)[head_dim / 16][row_tiles][4],
                         const SwizzledTile<T, head_dim>& right, int right_row) {
  const int lane = ptx::lane();
  MOBA_UNROLL
  for (int k = 0; k < head_dim / 16; ++k) {
    MOBA_UNROLL
    for (int j = 0; j < column_tiles; j += 2) {
      std::uint32_t b[4];
      load_b(b, right, right_row + 8 * j, k, lane);
      MOBA_UNROLL
      for (int i = 0; i < row_tiles; ++i) {
        ptx::mma_m16n8k16<T>(sums[i][j], left[k][i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[i][j + 1], left[k][i], b[2], b[3]);
      }
    }
  }
}

/// Computes sums += A B with A in registers (`weights`, in the accumulator layout) and B the columns of
/// `rows` from vector `first_vec` on.
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
