#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/warp.h: exchange between the 32 fibers of a warp.
namespace moba::cuda::ptx {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

template <typename T>
MOBA_DEVICE T shfl(T value, int from) {
  struct Operands {
    T value, result;
    int from;
  } own{value, value, from};
  emulation::collective("shuffle", &own, [](void* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      auto* lane = static_cast<Operands*>(lanes[i]);
      lane->result = static_cast<Operands*>(lanes[lane->from & (kLanes - 1)])->value;
    }
  });
  return own.result;
}
template <typename T>
MOBA_DEVICE T shfl_xor(T value, int mask) {
  return shfl(value, lane() ^ mask);
}
template <typename T>
MOBA_DEVICE T shfl_up(T value, int distance) {
  return shfl(value, lane() < distance ? lane() : lane() - distance);
}
MOBA_DEVICE unsigned ballot(bool predicate) {
  struct Operands {
    bool predicate;
    unsigned result;
  } own{predicate, 0};
  emulation::collective("ballot", &own, [](void* const* lanes) {
    unsigned mask = 0;
    for (int i = 0; i < kLanes; ++i)
      mask |= static_cast<unsigned>(static_cast<Operands*>(lanes[i])->predicate) << i;
    for (int i = 0; i < kLanes; ++i) static_cast<Operands*>(lanes[i])->result = mask;
  });
  return own.result;
}
MOBA_DEVICE unsigned match_any(std::uint32_t value) {
  struct Operands {
    std::uint32_t value;
    unsigned result;
  } own{value, 0};
  emulation::collective("match", &own, [](void* const* lanes) {
    for (int i = 0; i < kLanes; ++i) {
      auto* lane = static_cast<Operands*>(lanes[i]);
      for (int j = 0; j < kLanes; ++j)
        lane->result |= static_cast<unsigned>(static_cast<Operands*>(lanes[j])->value == lane->value) << j;
    }
  });
  return own.result;
}
MOBA_DEVICE void syncwarp() {
  int none = 0;
  emulation::collective("warp barrier", &none, [](void* const*) {});
}

MOBA_DEVICE int popc(unsigned bits) {
  return __builtin_popcount(bits);
}
MOBA_DEVICE int lowest_set_bit(unsigned bits) {
  return __builtin_ctz(bits);
}

}  // namespace moba::cuda::ptx
