// AMX multiplies tiles of 16 rows by 32 bf16 values at sixteen times the rate of f32 multiply-adds;
// AVX512-BF16 doubles that rate on the CPUs where it is not microcoded down. Neither is known to Highway 1.0,
// hence intrinsics and a detection of our own.
#include "cpu/bf16_tile.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace moba::cpu {
namespace {

constexpr std::size_t kTile = 16;

#define MOBA_AMX __attribute__((target("amx-tile,amx-bf16")))

/// Eight tiles of 16 rows by 64 bytes. Static, because the intrinsic tells the compiler of its first bytes
/// only.
struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kConfig;

MOBA_AMX void amx_begin() {
  _tile_loadconfig(&kConfig);
}

MOBA_AMX void amx_end() {
  _tile_release();
}

/// Tiles 0 to 3 hold a 32 x 32 block of results, 4 and 5 the rows, 6 and 7 the panel.
MOBA_AMX void amx_multiply(const bfloat16* rows, std::size_t row_stride, std::size_t count,
                           const bfloat16* panels, std::size_t panel_stride, std::size_t columns,
                           std::size_t depth, float* out, std::size_t out_stride) {
  const std::size_t row_bytes = row_stride * sizeof(bfloat16), out_bytes = out_stride * sizeof(float);
  constexpr std::size_t kPanelBytes = 2 * kBf16Cols * sizeof(bfloat16);
  for (std::size_t column = 0; column < columns; column += kBf16Cols, panels += panel_stride) {
    float* to = out + column;
    _tile_zero(0);
    _tile_zero(1);
    if (count <= kTile) {
      for (std::size_t i = 0; i < depth; i += kBf16Depth) {
        _tile_loadd(4, rows + i, row_bytes);
        _tile_loadd(6, panels + i * kBf16Cols, kPanelBytes);
        _tile_loadd(7, panels + i * kBf16Cols + 2 * kTile, kPanelBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, to, out_bytes);
      _tile_stored(1, to + kTile, out_bytes);
      continue;
    }
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t i = 0; i < depth; i += kBf16Depth) {
      _tile_loadd(4, rows + i, row_bytes);
      _tile_loadd(6, panels + i * kBf16Cols, kPanelBytes);
      _tile_loadd(7, panels + i * kBf16Cols + 2 * kTile, kPanelBytes);
      _tile_loadd(5, rows + kTile * row_stride + i, row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, out_bytes);
    _tile_stored(1, to + kTile, out_bytes);
    _tile_stored(2, to + kTile * out_stride, out_bytes);
    _tile_stored(3, to + kTile * out_stride + kTile, out_bytes);
  }
}

constexpr std::size_t kDotRows = 12;

#define MOBA_AVX512_BF16 __attribute__((target("avx512f,avx512bf16")))

/// Twelve rows by two vectors of columns.
MOBA_AVX512_BF16 void dot_multiply(const bfloat16* rows, std::size_t row_stride, std::size_t /*count*/,
                                   const bfloat16* panels, std::size_t panel_stride, std::size_t columns,
                                   std::size_t depth, float* out, std::size_t out_stride) {
  for (std::size_t column = 0; column < columns; column += kBf16Cols, panels += panel_stride) {
    __m512 left[kDotRows], right[kDotRows];
#pragma GCC unroll 12
    for (std::size_t r = 0; r < kDotRows; ++r) left[r] = right[r] = _mm512_setzero_ps();
    for (std::size_t i = 0; i < depth; i += 2) {
      const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panels + i * kBf16Cols));
      const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panels + i * kBf16Cols + kBf16Cols));
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

void nothing() {}

constexpr Bf16Tiles kAmx{"amx", 2 * kTile, amx_multiply, amx_begin, amx_end};
constexpr Bf16Tiles kAvx512Bf16{"avx512_bf16", kDotRows, dot_multiply, nothing, nothing};

bool cpu_has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
         (a & (1U << 5)) != 0;
}

/// The kernel hands out the 8 KiB of tile state only to processes that ask.
bool cpu_has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = (1U << 24) | (1U << 22);
  if (!__builtin_cpu_supports("avx512f") || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 ||
      (d & kTiles) != kTiles)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Bf16Tiles* detect() {
  const char* forced = std::getenv("MOBA_CPU_BF16");
  const std::string_view wanted = forced == nullptr ? "" : forced;
  if ((wanted.empty() || wanted == kAmx.name) && cpu_has_amx()) return &kAmx;
  if (wanted == kAvx512Bf16.name && cpu_has_avx512_bf16()) return &kAvx512Bf16;
  // Intel's cores run these dot products at half the rate of f32 multiply-adds, AMD's at twice.
  if (wanted.empty() && __builtin_cpu_is("amd") && cpu_has_avx512_bf16()) return &kAvx512Bf16;
  return nullptr;
}

}  // namespace

const Bf16Tiles* bf16_tiles() {
  static const Bf16Tiles* const tiles = detect();
  return tiles;
}

}  // namespace moba::cpu

#else

namespace moba::cpu {

const Bf16Tiles* bf16_tiles() {
  return nullptr;
}

}  // namespace moba::cpu

#endif
