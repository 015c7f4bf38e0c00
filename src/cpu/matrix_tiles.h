#pragma once

#include <cstddef>
#include <cstdint>

#include "moba/tensor.h"

/// Products of narrow matrices by the CPU's own instructions for them: AMX, AVX512-BF16, AVX512-VNNI.
namespace moba::cpu {

/// Columns of a panel, and the multiple that depths are padded to.
constexpr std::size_t kNarrowCols = 32, kBf16Depth = 32, kInt8Depth = 64;

/// `In` rows times `Packed` panels, accumulated in `Out`. A panel is [depth / n][kNarrowCols][n]: n
/// neighbours in depth, 4 bytes, lie together.
template <typename In, typename Packed, typename Out>
struct MatrixTiles {
  const char* name;
  /// Rows worked on at a time.
  std::size_t rows;
  /// out[r][c] = rows[r] . column c, for `count` rows and all `columns` (whole panels, `panel_stride` values
  /// apart). Up to rows - 1 rows past `count` may be read and written.
  void (*multiply)(const In* rows, std::size_t row_stride, std::size_t count, const Packed* panels,
                   std::size_t panel_stride, std::size_t columns, std::size_t depth, Out* out,
                   std::size_t out_stride);
  /// Around a thread's use of `multiply`.
  void (*begin)();
  void (*end)();
};

using Bf16Tiles = MatrixTiles<bfloat16, bfloat16, float>;
using Int8Tiles = MatrixTiles<std::uint8_t, std::int8_t, std::int32_t>;

/// The fastest that this CPU, its system and MOBA_CPU_BF16 (amx, avx512_bf16, none) allow; null when bf16 is
/// to be widened to f32.
const Bf16Tiles* bf16_tiles();
/// Likewise with MOBA_CPU_INT8 (amx, avx512_vnni, none); null when there is no faster way than f32.
const Int8Tiles* int8_tiles();

}  // namespace moba::cpu
