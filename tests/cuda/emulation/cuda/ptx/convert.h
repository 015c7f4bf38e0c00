#pragma once

#include <bit>
#include <cmath>

#include "cuda/ptx/device.h"
#include "number.h"

/// Replaces src/cuda/ptx/convert.h: conversions and functions of the host.
namespace moba::cuda::ptx {

MOBA_DEVICE std::uint32_t float_as_uint(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
MOBA_DEVICE float uint_as_float(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}
MOBA_DEVICE std::uint16_t rounded_bits(bfloat16, float value) {
  return to_bfloat16(value).bits;
}
MOBA_DEVICE std::uint16_t rounded_bits(float16, float value) {
  return to_float16(value).bits;
}
template <typename T>
MOBA_DEVICE std::uint32_t pack(float low, float high) {
  return rounded_bits(T{}, low) | static_cast<std::uint32_t>(rounded_bits(T{}, high)) << 16;
}
template <typename T>
MOBA_DEVICE float unpack_low(std::uint32_t pair) {
  return float_of(T{static_cast<std::uint16_t>(pair)});
}
template <typename T>
MOBA_DEVICE float unpack_high(std::uint32_t pair) {
  return float_of(T{static_cast<std::uint16_t>(pair >> 16)});
}
MOBA_DEVICE float exp2(float x) {
  return std::exp2(x);
}
MOBA_DEVICE float log2(float x) {
  return std::log2(x);
}
MOBA_DEVICE float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}
MOBA_DEVICE float fmax(float a, float b) {
  return std::fmax(a, b);
}
MOBA_DEVICE float fmin(float a, float b) {
  return std::fmin(a, b);
}
MOBA_DEVICE float at_most_zero(float x) {
  return x > 0 ? 0 : x;
}

MOBA_DEVICE float infinity() {
  return uint_as_float(0x7F800000U);
}
MOBA_DEVICE float nan() {
  return uint_as_float(0x7FC00000U);
}

}  // namespace moba::cuda::ptx
