// AMX multiplies tiles of 16 rows by 32 bf16 values at sixteen times the rate of f32 multiply-adds;
// AVX512-BF16 doubles that rate on the CPUs where it is not microcoded down. Neither is known to Highway 1.0,
// hence intrinsics and a detection of our own.
#include "cpu/matrix_tiles.h"

#include "cpu_features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace moba::cpu {
namespace {

constexpr std::size_t kTile = 16;

#define MOBA_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

/// Static, because the intrinsic tells the compiler of its first bytes only.
const AmxTileConfig kConfig;

MOBA_AMX void amx_begin() {
  _tile_loadconfig(&kConfig);
}

MOBA_AMX void amx_end() {
  _tile_release();
}

struct AmxBf16 {
  MOBA_AMX static void upper() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  MOBA_AMX static void lower() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct AmxInt8 {
  MOBA_AMX static void upper() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
  }
  MOBA_AMX static void lower() {
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
};

constexpr std::size_t kPanelBytes = 4 * kMatrixCols;

/// Tiles 0 to 3 hold a 32 x 32 block of results, or its upper half alone; 4 and 5 the rows, 6 and 7 the
/// panel.
MOBA_AMX void zero_block() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

MOBA_AMX void load_block(bool both, const float* out, std::size_t stride) {
  const std::size_t bytes = stride * sizeof(float);
  _tile_loadd(0, out, bytes);
  _tile_loadd(1, out + kTile, bytes);
  if (!both) return;
  _tile_loadd(2, out + kTile * stride, bytes);
  _tile_loadd(3, out + kTile * stride + kTile, bytes);
}

template <typename Out>
MOBA_AMX void store_block(bool both, Out* out, std::size_t stride) {
  const std::size_t bytes = stride * sizeof(Out);
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + kTile, bytes);
  if (!both) return;
  _tile_stored(2, out + kTile * stride, bytes);
  _tile_stored(3, out + kTile * stride + kTile, bytes);
}

template <typename In>
MOBA_AMX void load_rows(bool both, const In* rows, std::size_t stride) {
  _tile_loadd(4, rows, stride * sizeof(In));
  if (both) _tile_loadd(5, rows + kTile * stride, stride * sizeof(In));
}

template <typename Packed>
MOBA_AMX void load_panel(const Packed* panel) {
  _tile_loadd(6, panel, kPanelBytes);
  _tile_loadd(7, panel + 4 * kTile / sizeof(Packed), kPanelBytes);
}

template <typename Dot>
MOBA_AMX void multiply_block(bool both) {
  Dot::upper();
  if (both) Dot::lower();
}

template <typename In, typename Packed, typename Out, typename Dot>
MOBA_AMX void amx_multiply(const In* rows, std::size_t row_stride, std::size_t count, const Packed* panels,
                           std::size_t panel_stride, std::size_t columns, std::size_t depth, Out* out,
                           std::size_t out_stride) {
  constexpr std::size_t kStep = 64 / sizeof(In);
  const bool both = count > kTile;
  for (std::size_t column = 0; column < columns; column += kMatrixCols, panels += panel_stride) {
    zero_block();
    for (std::size_t i = 0; i < depth; i += kStep) {
      load_rows(both, rows + i, row_stride);
      load_panel(panels + i * kMatrixCols);
      multiply_block<Dot>(both);
    }
    store_block(both, out + column, out_stride);
  }
}

/// Computes the five small products first, over the whole depth, then the large one, so that intermediate
/// rounding errors stay small. Each step loads only one new operand.
template <bool kSplit>
MOBA_AMX void amx_multiply_parts(const bfloat16* rows, std::size_t row_stride, std::size_t row_part,
                                 std::size_t count, const bfloat16* panel, std::size_t panel_part,
                                 std::size_t depth, bool more, float* out, std::size_t out_stride,
                                 RowPrefetcher& prefetcher) {
  constexpr std::size_t kStep = 32;
  constexpr int kLines = 3;  // in the time of four products
  const bool both = count > kTile;
  if (more) {
    load_block(both, out, out_stride);
  } else {
    zero_block();
  }
  for (std::size_t i = 0; kSplit && i < depth; i += kStep) {
    const bfloat16 *from = rows + i, *columns = panel + i * kMatrixCols;
    load_rows(both, from + 2 * row_part, row_stride);
    load_panel(columns);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
    load_rows(both, from + row_part, row_stride);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
    load_panel(columns + panel_part);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
    load_rows(both, from, row_stride);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
    load_panel(columns + 2 * panel_part);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
  }
  for (std::size_t i = 0; i < depth; i += kStep) {
    load_rows(both, rows + i, row_stride);
    load_panel(panel + i * kMatrixCols);
    multiply_block<AmxBf16>(both);
    prefetcher.advance(kLines);
  }
  store_block(both, out, out_stride);
}

constexpr std::size_t kDotRows = 12;

#define MOBA_AVX512_BF16 __attribute__((target("avx512f,avx512bf16")))

/// Twelve rows by two vectors of columns.
MOBA_AVX512_BF16 void dot_multiply(const bfloat16* rows, std::size_t row_stride, std::size_t /*count*/,
                                   const bfloat16* panels, std::size_t panel_stride, std::size_t columns,
                                   std::size_t depth, float* out, std::size_t out_stride) {
  for (std::size_t column = 0; column < columns; column += kMatrixCols, panels += panel_stride) {
    __m512 left[kDotRows], right[kDotRows];
#pragma GCC unroll 12
    for (std::size_t r = 0; r < kDotRows; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (std::size_t i = 0; i < depth; i += 2) {
      const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panels + i * kMatrixCols));
      const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panels + i * kMatrixCols + kMatrixCols));
#pragma GCC unroll 12
      for (std::size_t r = 0; r < kDotRows; ++r) {
        std::int32_t pair;
        std::memcpy(&pair, rows + r * row_stride + i, sizeof(pair));
        const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        left[r] = _mm512_dpbf16_ps(left[r], a, b0);
        right[r] = _mm512_dpbf16_ps(right[r], a, b1);
      }
    }
#pragma GCC unroll 12
    for (std::size_t r = 0; r < kDotRows; ++r) {
      _mm512_storeu_ps(out + r * out_stride + column, left[r]);
      _mm512_storeu_ps(out + r * out_stride + column + 16, right[r]);
    }
  }
}

#define MOBA_AVX512_VNNI __attribute__((target("avx512f,avx512vnni")))

MOBA_AVX512_VNNI void vnni_multiply(const std::uint8_t* rows, std::size_t row_stride, std::size_t /*count*/,
                                    const std::int8_t* panels, std::size_t panel_stride, std::size_t columns,
                                    std::size_t depth, std::int32_t* out, std::size_t out_stride) {
  for (std::size_t column = 0; column < columns; column += kMatrixCols, panels += panel_stride) {
    __m512i left[kDotRows], right[kDotRows];
#pragma GCC unroll 12
    for (std::size_t r = 0; r < kDotRows; ++r) left[r] = right[r] = _mm512_setzero_si512();
    for (std::size_t i = 0; i < depth; i += 4) {
      const __m512i b0 = _mm512_loadu_si512(panels + i * kMatrixCols),
                    b1 = _mm512_loadu_si512(panels + i * kMatrixCols + 64);
#pragma GCC unroll 12
      for (std::size_t r = 0; r < kDotRows; ++r) {
        std::int32_t four;
        std::memcpy(&four, rows + r * row_stride + i, sizeof(four));
        const __m512i a = _mm512_set1_epi32(four);
        left[r] = _mm512_dpbusd_epi32(left[r], a, b0);
        right[r] = _mm512_dpbusd_epi32(right[r], a, b1);
      }
    }
#pragma GCC unroll 12
    for (std::size_t r = 0; r < kDotRows; ++r) {
      _mm512_storeu_si512(out + r * out_stride + column, left[r]);
      _mm512_storeu_si512(out + r * out_stride + column + 16, right[r]);
    }
  }
}

void no_op() {}

constexpr Bf16Tiles kAmxBf16{"amx", 2 * kTile, amx_multiply<bfloat16, bfloat16, float, AmxBf16>, amx_begin,
                             amx_end};
constexpr Int8Tiles kAmxInt8{"amx", 2 * kTile, amx_multiply<std::uint8_t, std::int8_t, std::int32_t, AmxInt8>,
                             amx_begin, amx_end};
constexpr Bf16x6Tiles kAmxBf16x6{2 * kTile, amx_multiply_parts<true>, amx_multiply_parts<false>, amx_begin,
                                 amx_end};
constexpr Bf16Tiles kAvx512Bf16{"avx512_bf16", kDotRows, dot_multiply, no_op, no_op};
constexpr Int8Tiles kAvx512Vnni{"avx512_vnni", kDotRows, vnni_multiply, no_op, no_op};

}  // namespace

const Bf16Tiles* bf16_tiles() {
  switch (bf16_unit()) {
    case Bf16Unit::amx:
      return &kAmxBf16;
    case Bf16Unit::avx512_bf16:
      return &kAvx512Bf16;
    case Bf16Unit::none:
      return nullptr;
  }
  return nullptr;
}

const Bf16x6Tiles* amx_bf16x6_tiles() {
  return cpu_features().amx ? &kAmxBf16x6 : nullptr;
}

const Bf16x6Tiles* bf16x6_tiles() {
  return environment_selects("MOBA_CPU_F32", "amx", true) ? amx_bf16x6_tiles() : nullptr;
}

const Int8Tiles* int8_tiles() {
  constexpr const char* kVariable = "MOBA_CPU_INT8";
  if (environment_selects(kVariable, kAmxInt8.name, true) && cpu_features().amx) return &kAmxInt8;
  if (environment_selects(kVariable, kAvx512Vnni.name, true) && cpu_features().avx512_vnni)
    return &kAvx512Vnni;
  return nullptr;
}

}  // namespace moba::cpu

#else

namespace moba::cpu {

const Bf16Tiles* bf16_tiles() {
  return nullptr;
}
const Bf16x6Tiles* amx_bf16x6_tiles() {
  return nullptr;
}
const Bf16x6Tiles* bf16x6_tiles() {
  return nullptr;
}
const Int8Tiles* int8_tiles() {
  return nullptr;
}

}  // namespace moba::cpu

#endif
