#pragma once

#include <algorithm>
#include <functional>

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
struct Min {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return std::min(a, b); }
};
struct Max {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return std::max(a, b); }
};
template <typename Combine, typename T>
MOBA_DEVICE T reduce(T value) {
  struct Operands {
    T value, result;
  } own{value, value};
  emulation::collective("reduction", &own, [](void* const* lanes) {
    T result = static_cast<Operands*>(lanes[0])->value;
    for (int i = 1; i < kLanes; ++i) result = Combine{}(result, static_cast<Operands*>(lanes[i])->value);
    for (int i = 0; i < kLanes; ++i) static_cast<Operands*>(lanes[i])->result = result;
  });
  return own.result;
}
MOBA_DEVICE int reduce_add(int value) {
  return reduce<std::plus<>>(value);
}
MOBA_DEVICE std::uint32_t reduce_min(std::uint32_t value) {
  return reduce<Min>(value);
}
MOBA_DEVICE std::uint32_t reduce_max(std::uint32_t value) {
  return reduce<Max>(value);
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
MOBA_DEVICE int leading_zeros(unsigned bits) {
  return bits == 0 ? 32 : __builtin_clz(bits);
}
MOBA_DEVICE int lowest_set_bit(unsigned bits) {
  return __builtin_ctz(bits);
}

}  // namespace moba::cuda::ptx
