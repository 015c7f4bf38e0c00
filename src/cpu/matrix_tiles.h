#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/prefetch.h"
#include "moba/tensor.h"

/// Matrix products with the CPU's instructions for 8- and 16-bit types: AMX, AVX512-BF16, AVX512-VNNI.
namespace moba::cpu {

/// Columns of a panel, and the multiple that depths are padded to.
constexpr std::size_t kMatrixCols = 32, kBf16Depth = 32, kInt8Depth = 64;

/// `In` rows times `Packed` panels, accumulated in `Out`. A panel is [depth / n][kMatrixCols][n]: n
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
  /// Called by a thread before its first and after its last `multiply`.
  void (*begin)();
  void (*end)();
};

using Bf16Tiles = MatrixTiles<bfloat16, bfloat16, float>;
using Int8Tiles = MatrixTiles<std::uint8_t, std::int8_t, std::int32_t>;

/// Products of f32 matrices on bf16 units (bf16x6-inl.h): an f32 is the sum of three bf16 values, and six of
/// the nine products of parts are all that f32 resolves. Part p of the rows starts p * row_part values after
/// the first, likewise in each panel.
struct Bf16x6Tiles {
  std::size_t rows;
  /// Computes out = rows . panel, or out += rows . panel if `more`; otherwise as MatrixTiles::multiply.
  void (*multiply)(const bfloat16* rows, std::size_t row_stride, std::size_t row_part, std::size_t count,
                   const bfloat16* panel, std::size_t panel_part, std::size_t depth, bool more, float* out,
                   std::size_t out_stride, RowPrefetcher& prefetcher);
  /// As `multiply`, for operands that are bf16 and so have one part.
  decltype(multiply) multiply_bf16;
  void (*begin)();
  void (*end)();
};

/// Returns the fastest bf16 products that the CPU, the operating system and MOBA_CPU_BF16 (amx, avx512_bf16,
/// none) allow; null when bf16 is to be converted to f32.
const Bf16Tiles* bf16_tiles();
/// Returns the products of bf16 parts where the CPU has AMX, else null.
const Bf16x6Tiles* amx_bf16x6_tiles();
/// Returns the products of bf16 parts that f32 tensors use; null without AMX or when MOBA_CPU_F32 (amx, fma)
/// selects multiply-adds.
const Bf16x6Tiles* bf16x6_tiles();
/// Returns the fastest int8 products that the CPU and MOBA_CPU_INT8 (amx, avx512_vnni, none) allow; null when
/// f32 is at least as fast.
const Int8Tiles* int8_tiles();

}  // namespace moba::cpu
