#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "moba/tensor.h"

/// Single numbers in and out of their storage type. Hot loops use vector versions.
namespace moba {

inline float float_of(bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

inline bfloat16 to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
  return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};  // nearest, ties to even
}

inline float float_of(float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000U) << 16, exponent = (value.bits >> 10) & 0x1FU;
  const std::uint32_t mantissa = value.bits & 0x3FFU;
  if (exponent == 0) {  // zero and subnormals: mantissa x 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t widened = exponent == 0x1FU ? 0xFFU : exponent + 112U;
  return std::bit_cast<float>(sign | (widened << 23) | (mantissa << 13));
}

inline float16 to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000U, magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return {static_cast<std::uint16_t>(sign | 0x7E00U)};
  if (magnitude >= 0x477FF000U)
    return {static_cast<std::uint16_t>(sign | 0x7C00U)};  // rounds to 65536 or more
  if (magnitude < 0x38800000U) {  // below 2^-14: the float addition rounds to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U))};
  }
  const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};
}

/// The nearest value that `dtype` holds; f32, and i8 whose values carry a scale, stay as they are.
inline float rounded_to(DType dtype, float value) {
  if (dtype == DType::bf16) return float_of(to_bfloat16(value));
  if (dtype == DType::f16) return float_of(to_float16(value));
  return value;
}

/// Element `index` of an array of `dtype`.
inline double load(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(data)[index];
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::bf16:
      return float_of(static_cast<const bfloat16*>(data)[index]);
    case DType::f16:
      return float_of(static_cast<const float16*>(data)[index]);
    case DType::i8:
      return static_cast<const std::int8_t*>(data)[index];
  }
  return 0;
}

/// Rounds once to `dtype` (never i8, which needs a scale).
inline void store(void* data, DType dtype, std::int64_t index, double value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<bfloat16*>(data)[index] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::f16:
      static_cast<float16*>(data)[index] = to_float16(static_cast<float>(value));
      break;
    case DType::i8:
      break;
  }
}

}  // namespace moba
