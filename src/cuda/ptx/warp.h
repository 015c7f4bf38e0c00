#pragma once

#include "cuda/ptx/device.h"

/// What the 32 lanes of a warp do together; all of them must come.
namespace moba::cuda::ptx {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// The value that another lane holds.
template <typename T>
MOBA_DEVICE T shfl(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}
template <typename T>
MOBA_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
/// The value `distance` lanes below; the own one where there is none.
template <typename T>
MOBA_DEVICE T shfl_up(T value, int distance) {
  return __shfl_up_sync(kAllLanes, value, distance);
}
/// One bit a lane: where the predicate holds.
MOBA_DEVICE unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}
/// The lanes whose value equals the own one.
MOBA_DEVICE unsigned match_any(std::uint32_t value) {
  return __match_any_sync(kAllLanes, value);
}
/// Orders the lanes' accesses to memory.
MOBA_DEVICE void syncwarp() {
  __syncwarp();
}

MOBA_DEVICE int popc(unsigned bits) {
  return __popc(bits);
}
/// Of a number that is not 0.
MOBA_DEVICE int lowest_set_bit(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

}  // namespace moba::cuda::ptx
