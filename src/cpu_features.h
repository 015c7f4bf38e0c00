#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>

/// Matrix instructions of x86-64 CPUs, which Highway 1.0 does not detect: AMX, AVX512-BF16 and AVX512-VNNI.
/// Shared by the kernels and by the measurement of their ceiling.
namespace moba {

/// The CPU's own products of bf16.
enum class Bf16Unit : std::uint8_t { none, avx512_bf16, amx };

/// Returns whether the environment variable selects `name`, or selects nothing and `name` is `preferred`.
inline bool environment_selects(const char* variable, std::string_view name, bool preferred) {
  const char* selected = std::getenv(variable);
  return selected == nullptr || *selected == '\0' ? preferred : selected == name;
}

}  // namespace moba

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace moba {

/// Instructions of the CPU, without regard to the environment.
struct CpuFeatures {
  bool amx = false;  // tiles, bf16 and int8, granted by the operating system
  bool avx512_bf16 = false, avx512_vnni = false;
  /// Intel's cores run AVX512-BF16 at half the rate of f32 multiply-adds, AMD's at twice.
  bool fast_avx512_bf16 = false;
};

inline const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    constexpr unsigned kAmx = (1U << 24) | (1U << 25) | (1U << 22), kVnni = 1U << 11, kAvx512Bf16 = 1U << 5;
    // The operating system grants the 8 KiB of tile state only to processes that request it.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    CpuFeatures found;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("avx512f")) return found;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || a == 0) return found;
    found.avx512_vnni = (c & kVnni) != 0;
    found.amx = (d & kAmx) == kAmx && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    found.avx512_bf16 = (a & kAvx512Bf16) != 0;
    found.fast_avx512_bf16 = found.avx512_bf16 && __builtin_cpu_is("amd") != 0;
    return found;
  }();
  return features;
}

/// Returns the fastest bf16 products that the CPU, the operating system and MOBA_CPU_BF16 (amx, avx512_bf16,
/// none) allow; none where those in f32 are faster.
inline Bf16Unit bf16_unit() {
  constexpr const char* kVariable = "MOBA_CPU_BF16";
  const CpuFeatures& cpu = cpu_features();
  if (environment_selects(kVariable, "amx", true) && cpu.amx) return Bf16Unit::amx;
  if (environment_selects(kVariable, "avx512_bf16", cpu.fast_avx512_bf16) && cpu.avx512_bf16)
    return Bf16Unit::avx512_bf16;
  return Bf16Unit::none;
}

/// Configuration of eight AMX tiles of 16 rows by 64 bytes, palette 1.
struct AmxTileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace moba

#else

namespace moba {

inline Bf16Unit bf16_unit() {
  return Bf16Unit::none;
}

}  // namespace moba
#endif
