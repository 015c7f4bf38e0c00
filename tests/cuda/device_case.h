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

/// Returns whether a row attends to a key, in causal attention of one sequence with as many queries as keys.
bool attends(const Case& c, const Result& forward, std::int64_t head, std::int64_t query, std::int64_t key);
bool row_is_finite(const Array& array, std::int64_t token, std::int64_t head);

/// Checks the forward pass with a NaN and an infinity in q, k or v: they reach exactly the rows that attend
/// to them, and LSE only from q and k.
void check_non_finite_forward(std::int64_t head_dim, const Routing& routing);

/// Returns a small case of any kind that the CUDA backend supports, the same for the same seed.
Case random_device_case(std::uint64_t seed);

}  // namespace moba::test
