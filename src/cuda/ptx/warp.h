#pragma once

#include "cuda/ptx/device.h"

/// Exchange between the 32 lanes of a warp; all lanes must call.
namespace moba::cuda::ptx {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

/// Returns the value of lane `from`.
template <typename T>
MOBA_DEVICE T shfl(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}
template <typename T>
MOBA_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
/// Returns the value `distance` lanes below; the own value where there is none.
template <typename T>
MOBA_DEVICE T shfl_up(T value, int distance) {
  return __shfl_up_sync(kAllLanes, value, distance);
}
/// Returns a mask of the lanes whose predicate holds.
MOBA_DEVICE unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}
/// Reductions over the lanes.
MOBA_DEVICE int reduce_add(int value) {
  return __reduce_add_sync(kAllLanes, value);
}
MOBA_DEVICE std::uint32_t reduce_min(std::uint32_t value) {
  return __reduce_min_sync(kAllLanes, value);
}
MOBA_DEVICE std::uint32_t reduce_max(std::uint32_t value) {
  return __reduce_max_sync(kAllLanes, value);
}
/// Returns a mask of the lanes with the same value.
MOBA_DEVICE unsigned match_any(std::uint32_t value) {
  return __match_any_sync(kAllLanes, value);
}
/// Synchronises the warp and orders its memory accesses.
MOBA_DEVICE void syncwarp() {
  __syncwarp();
}

MOBA_DEVICE int popc(unsigned bits) {
  return __popc(bits);
}
/// Number of zero bits above the highest set bit; 32 of zero.
MOBA_DEVICE int leading_zeros(unsigned bits) {
  return __clz(static_cast<int>(bits));
}
/// Index of the lowest set bit of a nonzero number.
MOBA_DEVICE int lowest_set_bit(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

}  // namespace moba::cuda::ptx
