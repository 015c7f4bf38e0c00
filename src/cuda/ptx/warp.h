#pragma once

#include "cuda/ptx/device.h"

/// What the 32 lanes of a warp do together; all of them must come.
namespace moba::cuda::ptx {

constexpr unsigned kAllLanes = 0xFFFFFFFFU;

#if defined(MOBA_CUDA_EMULATION)

/// The value that another lane holds.
template <typename T>
MOBA_DEVICE T shuffle(T value, int from) {
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
MOBA_DEVICE T shuffle_xor(T value, int mask) {
  return shuffle(value, lane() ^ mask);
}
/// The value `distance` lanes below; the own one where there is none.
template <typename T>
MOBA_DEVICE T shuffle_up(T value, int distance) {
  return shuffle(value, lane() < distance ? lane() : lane() - distance);
}
/// One bit a lane: where the predicate holds.
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
/// The lanes whose value equals the own one.
MOBA_DEVICE unsigned match(std::uint32_t value) {
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
/// Orders the lanes' accesses to memory.
MOBA_DEVICE void warp_barrier() {
  int none = 0;
  emulation::collective("warp barrier", &none, [](void* const*) {});
}

MOBA_DEVICE int count_bits(unsigned bits) {
  return __builtin_popcount(bits);
}
/// Of a number that is not 0.
MOBA_DEVICE int lowest_bit(unsigned bits) {
  return __builtin_ctz(bits);
}

#else

/// The value that another lane holds.
template <typename T>
MOBA_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}
template <typename T>
MOBA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
/// The value `distance` lanes below; the own one where there is none.
template <typename T>
MOBA_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(kAllLanes, value, distance);
}
/// One bit a lane: where the predicate holds.
MOBA_DEVICE unsigned ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}
/// The lanes whose value equals the own one.
MOBA_DEVICE unsigned match(std::uint32_t value) {
  return __match_any_sync(kAllLanes, value);
}
/// Orders the lanes' accesses to memory.
MOBA_DEVICE void warp_barrier() {
  __syncwarp();
}

MOBA_DEVICE int count_bits(unsigned bits) {
  return __popc(bits);
}
/// Of a number that is not 0.
MOBA_DEVICE int lowest_bit(unsigned bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

#endif

}  // namespace moba::cuda::ptx
