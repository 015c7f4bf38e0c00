#pragma once

#include "cases.h"
#include "moba/cuda.h"

/// Cases on the device. Their tensors lie in host memory, and the tests' backend copies them (mirror.cpp).
namespace moba::test {

/// Marks a tensor as one of the device.
inline Tensor on_device(Tensor t) {
  t.device = Device::cuda;
  return t;
}

/// Runs run_attention on CUDA tensors.
Result run_on_device(const Case& c, Execution execution = {});

/// One sequence, two query heads on one kv head; bf16 where the seed is even, else f16.
Case case_of(std::uint64_t seed, std::int64_t head_dim, const Routing& routing, std::int64_t queries,
             std::int64_t keys);

/// Returns a small case of any kind that the CUDA backend supports, the same for the same seed.
Case random_device_case(std::uint64_t seed);

}  // namespace moba::test
