#pragma once

#include "cuda/ptx/convert.h"

namespace moba::cuda::tile {

/// Maps scores to integers of the same order; a NaN is the lowest score, -inf. kForced is above all, 0 below
/// all.
constexpr std::uint32_t kForced = 0xFFFFFFFFU;

MOBA_DEVICE std::uint32_t order_of(float score) {
  const std::uint32_t bits = ptx::float_as_uint(score == score ? score : -ptx::infinity());
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000U;
}

/// A score that may be among the best, and its block.
struct alignas(8) Candidate {
  float score;
  std::int32_t block;
};

}  // namespace moba::cuda::tile
