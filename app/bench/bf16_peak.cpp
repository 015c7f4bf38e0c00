#include "app/bench/bf16_peak.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>

namespace moba::bench {
namespace {

/// Tiles 0 to 5 are results of 16 x 16, 6 and 7 hold 16 x 32 values each.
__attribute__((target("amx-tile,amx-bf16"))) double multiply_amx(std::int64_t rounds, float* sink) {
  struct {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) float out[256];
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  const std::int64_t passes = rounds / 8;  // each does far more than a round of vectors
  for (std::int64_t pass = 0; pass < passes; ++pass) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_stored(0, out, 64);
  _tile_release();
  *sink = out[0];
  return 6.0 * static_cast<double>(passes) * 2 * 16 * 16 * 32;
}

__attribute__((target("avx512f,avx512bf16"))) double multiply_avx512(std::int64_t rounds, float* sink) {
  constexpr std::size_t kChains = 24;
  __m512 chain[kChains];
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3F003F00), b = a;  // 0.5 each
#pragma GCC unroll 24
  for (std::size_t i = 0; i < kChains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (std::size_t i = 0; i < kChains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], a, b);
  }
#pragma GCC unroll 24
  for (std::size_t i = 1; i < kChains; ++i) chain[0] = _mm512_add_ps(chain[0], chain[i]);
  *sink = _mm512_cvtss_f32(chain[0]);
  return 4.0 * static_cast<double>(rounds) * kChains * 16;
}

/// The system saves the tiles' state only for processes that ask.
bool amx_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  const bool has_tile = (d >> 24 & 1) != 0, has_bf16 = (d >> 22 & 1) != 0;
  return has_tile && has_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Bf16Peak* detect() {
  static constexpr Bf16Peak kAmx{"amx_bf16", multiply_amx}, kAvx512{"avx512_bf16", multiply_avx512};
  const char* wish = std::getenv("MOBA_CPU_BF16");
  const auto wanted = [&](std::string_view name, bool preferred) {
    return wish == nullptr || *wish == '\0' ? preferred : wish == name;
  };
  // Intel's cores run the AVX-512 products at half the rate of f32 multiply-adds.
  const bool fast = __builtin_cpu_is("amd") != 0;
  if (wanted("amx", true) && amx_granted()) return &kAmx;
  if (wanted("avx512_bf16", fast) && __builtin_cpu_supports("avx512bf16")) return &kAvx512;
  return nullptr;
}

}  // namespace

const Bf16Peak* bf16_peak() {
  static const Bf16Peak* const peak = detect();
  return peak;
}

}  // namespace moba::bench

#else

namespace moba::bench {

const Bf16Peak* bf16_peak() {
  return nullptr;
}

}  // namespace moba::bench

#endif
