#pragma once

#include <bit>
#include <limits>

#include "cuda/ptx/device.h"

namespace moba::cuda {

/// The largest position of a token: a larger block size divides positions like this one.
constexpr std::int64_t kMaxPosition = std::numeric_limits<std::int32_t>::max();

/// Divides numbers below 2^31 by a number of the launch, with a multiplication and a shift.
struct Divisor {
  explicit Divisor(std::int64_t number)
      : divisor(static_cast<std::uint32_t>(number)), shift(31 + std::bit_width(divisor - 1)) {
    // 2^shift / divisor rounded up: the excess of n * multiplier is below n * divisor <= 2^shift.
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  MOBA_HOST_DEVICE std::uint32_t quotient(std::uint32_t n) const {
    return static_cast<std::uint32_t>(std::uint64_t{n} * multiplier >> shift);
  }

  std::uint32_t divisor, multiplier;
  int shift;
};

}  // namespace moba::cuda
