#pragma once

#include <cstddef>

#include "moba/tensor.h"

namespace moba::cpu {

/// Products of bf16 matrices by the CPU's own bf16 instructions, accumulated in f32. A panel is [depth /
/// 2][kBf16Cols][2]: pairs of neighbours in depth lie together, as those instructions want them.
struct Bf16Tiles {
  const char* name;
  /// Rows worked on at a time.
  std::size_t rows;
  /// out[r][c] = rows[r] . column c, for `count` rows and all `columns` (whole panels, `panel_stride` values
  /// apart). `depth` is a multiple of 32. Up to rows - 1 rows past `count` may be read and written.
  void (*multiply)(const bfloat16* rows, std::size_t row_stride, std::size_t count, const bfloat16* panels,
                   std::size_t panel_stride, std::size_t columns, std::size_t depth, float* out,
                   std::size_t out_stride);
  /// Around a thread's use of `multiply`.
  void (*begin)();
  void (*end)();
};

constexpr std::size_t kBf16Cols = 32, kBf16Depth = 32;

/// The fastest of AMX and AVX512-BF16 that this CPU, its system and MOBA_CPU_BF16 (amx, avx512_bf16, none)
/// allow; null when bf16 is to be widened to f32.
const Bf16Tiles* bf16_tiles();

}  // namespace moba::cpu
