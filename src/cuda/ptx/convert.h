#pragma once

#include "cuda/ptx/device.h"

/// Conversions between f32 and pairs of 16-bit numbers, exp2 and log2.
namespace moba::cuda::ptx {

MOBA_DEVICE std::uint32_t float_as_uint(float value) {
  return __float_as_uint(value);
}
MOBA_DEVICE float uint_as_float(std::uint32_t bits) {
  return __uint_as_float(bits);
}
/// Rounds two values to T, the first in the low half.
template <typename T>
MOBA_DEVICE std::uint32_t pack(float low, float high) {
  std::uint32_t pair;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}
MOBA_DEVICE float widen_half(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
template <typename T>
MOBA_DEVICE float unpack_low(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(pair << 16);
  return widen_half(static_cast<std::uint16_t>(pair));
}
template <typename T>
MOBA_DEVICE float unpack_high(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, bfloat16>) return __uint_as_float(pair & 0xFFFF0000U);
  return widen_half(static_cast<std::uint16_t>(pair >> 16));
}
MOBA_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
MOBA_DEVICE float log2(float x) {
  float result;
  asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
/// Fused multiply-add: a * b + c, rounded once.
MOBA_DEVICE float fma(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
/// Maximum; of a number and a NaN, the number.
MOBA_DEVICE float fmax(float a, float b) {
  return fmaxf(a, b);
}
/// Minimum, likewise.
MOBA_DEVICE float fmin(float a, float b) {
  return fminf(a, b);
}
/// Minimum of x and 0; NaN of a NaN.
MOBA_DEVICE float at_most_zero(float x) {
  float result;
  asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(x));
  return result;
}

MOBA_DEVICE float infinity() {
  return uint_as_float(0x7F800000U);
}
MOBA_DEVICE float nan() {
  return uint_as_float(0x7FC00000U);
}

}  // namespace moba::cuda::ptx
