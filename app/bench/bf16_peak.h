#pragma once

#include <cstdint>

namespace moba::bench {

/// The CPU's own products of bf16, accumulated in f32.
struct Bf16Peak {
  const char* name;
  /// As multiply_add: does `rounds` rounds, returns the floating-point operations done.
  double (*multiply)(std::int64_t rounds, float* sink);
};

/// AMX, else AVX512-BF16, as the library would use here: it and MOBA_CPU_BF16 (amx, avx512_bf16, none) must
/// allow it. Null: neither.
const Bf16Peak* bf16_peak();

}  // namespace moba::bench
