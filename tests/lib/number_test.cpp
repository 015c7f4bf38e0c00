#include "number.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

namespace moba::test {
namespace {

template <typename Half>
Half rounded_to(float value) {
  if constexpr (std::is_same_v<Half, bfloat16>) {
    return to_bfloat16(value);
  } else {
    return to_float16(value);
  }
}

template <typename Half>
class Number : public testing::Test {};
using Halves = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Number, Halves);

TYPED_TEST(Number, EveryValueRoundTrips) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const TypeParam half{static_cast<std::uint16_t>(bits)};
    const float value = float_of(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(float_of(rounded_to<TypeParam>(value)))) << bits;
    } else {
      EXPECT_EQ(rounded_to<TypeParam>(value).bits, half.bits);
    }
  }
}

/// Checks that no neighbour is nearer, and that a midpoint rounds to even.
TYPED_TEST(Number, RoundsToNearestEven) {
  std::mt19937 engine(1);
  const float largest = float_of(
      TypeParam{std::is_same_v<TypeParam, bfloat16> ? std::uint16_t{0x7F7F} : std::uint16_t{0x7BFF}});
  for (int i = 0; i < 500000; ++i) {
    // Random bits, or the midpoint of two 16-bit values, or a neighbour of one.
    float value = std::bit_cast<float>(static_cast<std::uint32_t>(engine()));
    if (i % 4 != 0) {
      const TypeParam half{static_cast<std::uint16_t>(engine() & 0x7FFFU)};
      const TypeParam next{static_cast<std::uint16_t>(half.bits + 1)};
      value = (float_of(half) + float_of(next)) / 2;
      if (i % 4 == 2) value = std::nextafter(value, 0.0F);
      if (i % 4 == 3) value = std::nextafter(value, 1e38F);
    }
    if (!std::isfinite(value) || std::fabs(value) >= largest) continue;
    const TypeParam found = rounded_to<TypeParam>(value);
    const double error = std::fabs(static_cast<double>(float_of(found)) - value);
    for (const int step : {-1, 1}) {
      const TypeParam other{static_cast<std::uint16_t>(found.bits + step)};
      if (!std::isfinite(float_of(other)) || ((other.bits ^ found.bits) & 0x8000U) != 0) continue;
      const double other_error = std::fabs(static_cast<double>(float_of(other)) - value);
      ASSERT_LE(error, other_error) << value;
      ASSERT_FALSE(error == other_error && found.bits % 2 != 0) << value;
    }
  }
}

TYPED_TEST(Number, OverflowsToInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(float_of(rounded_to<TypeParam>(std::numeric_limits<float>::max())), infinity);
  EXPECT_EQ(float_of(rounded_to<TypeParam>(-infinity)), -infinity);
}

}  // namespace
}  // namespace moba::test
