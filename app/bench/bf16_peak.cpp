#include "app/bench/bf16_peak.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "src/cpu_features.h"

namespace moba::bench {
namespace {

/// Tiles 0 to 5 are results of 16 x 16, 6 and 7 hold 16 x 32 values each.
__attribute__((target("amx-tile,amx-bf16"))) double multiply_amx(std::int64_t rounds, float* sink) {
  static const AmxTileConfig config;
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

const Bf16Peak* detect() {
  static constexpr Bf16Peak kAmx{"amx_bf16", multiply_amx}, kAvx512{"avx512_bf16", multiply_avx512};
  switch (bf16_unit()) {
    case Bf16Unit::amx:
      return &kAmx;
    case Bf16Unit::avx512_bf16:
      return &kAvx512;
    case Bf16Unit::none:
      return nullptr;
  }
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
