// Measures the throughput of a core's execution units and its clock: multiply-adds from registers, a register
// tile with operands from L1, and AMX. The clock is derived from a chain of dependent multiplications
// between two bursts, so a core that slows down under load shows it. Needs Linux on x86-64 with AVX-512 and
// AMX.
//
//   g++ -O3 -std=c++20 benchmarks/units.cpp -o units && ./units
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../src/cpu_features.h"

namespace {

#define AVX512 __attribute__((noinline, target("avx512f")))
#define AMX __attribute__((noinline, target("amx-tile,amx-bf16")))

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Returns the clock in GHz from a chain of 3000 cycles, far shorter than a change of the clock takes.
double clock_now() {
  std::uint64_t x = 1;
  const double begin = seconds();
  for (int i = 0; i < 100; ++i) {
#pragma GCC unroll 10
    for (int j = 0; j < 10; ++j) asm volatile("imul $3, %0, %0" : "+r"(x));
  }
  return 3000 / (seconds() - begin) / 1e9;
}

constexpr int kRows = 14, kDepth = 128, kStride = 272;

/// Multiplies a tile of 14 rows by 32 columns over a depth of 128. `kFed`: operands from memory, not
/// registers.
template <bool kFed>
AVX512 void tile(const float* rows, const float* panel, float* out) {
  __m512 sums[kRows][2];
#pragma GCC unroll 14
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
  const __m512 fixed = _mm512_set1_ps(rows[0]);
  __m512 left = _mm512_loadu_ps(panel), right = _mm512_loadu_ps(panel + 16);
  for (int i = 0; i < kDepth; ++i) {
    if (kFed) {
      left = _mm512_loadu_ps(panel + 32 * i);
      right = _mm512_loadu_ps(panel + 32 * i + 16);
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      const __m512 a = kFed ? _mm512_set1_ps(rows[r * kStride + i]) : fixed;
      asm("vfmadd231ps %1, %2, %0" : "+v"(sums[r][0]) : "v"(a), "v"(left));
      asm("vfmadd231ps %1, %2, %0" : "+v"(sums[r][1]) : "v"(a), "v"(right));
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(out + r * kStride, sums[r][0]);
    _mm512_storeu_ps(out + r * kStride + 16, sums[r][1]);
  }
}

const moba::AmxTileConfig kConfig;

/// Computes 96 products of 16 x 32 by 32 x 16 bf16 values from the first-level cache.
AMX void amx_tile(const std::uint16_t* rows, const std::uint16_t* panel) {
  for (int i = 0; i < 24; ++i) {
    const std::uint16_t *a = rows + i % 4 * 32, *b = panel + i % 12 * 1024;
    _tile_loadd(4, a, 320);
    _tile_loadd(5, a + 16 * 160, 320);
    if (i % 2 == 0) {  // every second time one operand stays, as in the products of bf16 parts
      _tile_loadd(6, b, 128);
      _tile_loadd(7, b + 32, 128);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <typename Burst>
void measure(const char* name, double flops, Burst&& burst) {
  std::vector<double> rates, clocks;
  for (const double end = seconds() + 1; seconds() < end;) {
    const double begin = seconds();
    for (int i = 0; i < 20; ++i) burst();
    rates.push_back(20 * flops / (seconds() - begin) / 1e9);
    clocks.push_back(clock_now());
  }
  const auto median = [](std::vector<double>& x) {
    std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
    return x[x.size() / 2];
  };
  std::printf("| %-46s | %6.0f | %.2f |\n", name, median(rates), median(clocks));
}

AMX void begin_amx() {
  _tile_loadconfig(&kConfig);
}

}  // namespace

int main() {
  alignas(64) static float rows[kRows * kStride], panel[kDepth * 32], out[kRows * kStride];
  alignas(64) static std::uint16_t narrow[32 * 160], narrow_panel[12 * 1024];
  const auto any_f32 = [] { return static_cast<float>(std::rand() % 2000 - 1000) * 1e-3F; };
  const auto any_bf16 = [] {  // of size 1/2 to 2; zeros would draw less power
    return static_cast<std::uint16_t>(0x3F00 + std::rand() % 256 + std::rand() % 2 * 0x8000);
  };
  std::generate(std::begin(rows), std::end(rows), any_f32);
  std::generate(std::begin(panel), std::end(panel), any_f32);
  std::generate(std::begin(narrow), std::end(narrow), any_bf16);
  std::generate(std::begin(narrow_panel), std::end(narrow_panel), any_bf16);

  constexpr double kTileFlops = 2.0 * kRows * 32 * kDepth, kAmxFlops = 96 * 2.0 * 16 * 16 * 32;
  std::printf("| one core | GFLOP/s | GHz |\n|---|---|---|\n");
  measure("idle", 0, [] {});
  measure("f32 multiply-adds, operands in registers", kTileFlops, [&] { tile<false>(rows, panel, out); });
  measure("f32 tile, operands from L1", kTileFlops, [&] { tile<true>(rows, panel, out); });
  if (!moba::cpu_features().amx) return 0;
  begin_amx();
  measure("AMX bf16 products", kAmxFlops, [&] { amx_tile(narrow, narrow_panel); });
}
