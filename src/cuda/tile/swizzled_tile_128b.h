#pragma once

#include "cuda/ptx/wgmma.h"
#include "cuda/tile/swizzled_tile.h"

namespace moba::cuda::tile {

/// Tile of rows of `head_dim` 16-bit elements in shared memory, in panels of 64 columns with the 128-byte
/// swizzle of TMA and wgmma. Aligned to 1024 bytes.
template <typename T, int rows, int head_dim>
struct SwizzledTile128B {
  using Element = T;
  static constexpr int kRows = rows, kVecs = head_dim / kVecElements;
  static constexpr int kRowBytes = 128, kColumns = kRowBytes / 2, kPanels = head_dim / kColumns;
  static constexpr std::uint32_t kPanelBytes = rows * kRowBytes, kBytes = kPanels * kPanelBytes;
  static constexpr std::uint32_t kCoreBytes = 8 * kRowBytes;

  std::byte* data;

  MOBA_DEVICE static std::uint32_t start(int row, int index) {
    return static_cast<std::uint32_t>(index / 8) * kPanelBytes +
           static_cast<std::uint32_t>(row * kRowBytes + ((index ^ row) & 7) * 16);
  }
  MOBA_DEVICE T* vec(int row, int index) const { return reinterpret_cast<T*>(data + start(row, index)); }

  /// K-major operand of the rows from `row` (a multiple of 8) on, at step `k` of 16 elements.
  MOBA_DEVICE std::uint64_t k_major_descriptor(int row, int k) const {
    return ptx::advance_descriptor(
        ptx::matrix_descriptor(ptx::shared_address(data) + static_cast<std::uint32_t>(row * kRowBytes), 16,
                               kCoreBytes),
        static_cast<std::uint32_t>(k / 4) * kPanelBytes + static_cast<std::uint32_t>(k % 4 * 32));
  }
  /// MN-major operand of all columns, for sums over rows [row, row + 16); `row` is a multiple of 16.
  MOBA_DEVICE std::uint64_t mn_major_descriptor(int row) const {
    return ptx::advance_descriptor(ptx::matrix_descriptor(ptx::shared_address(data), kPanelBytes, kCoreBytes),
                                   static_cast<std::uint32_t>(row * kRowBytes));
  }
};

}  // namespace moba::cuda::tile
