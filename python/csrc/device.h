/// Torch's CUDA devices. tests/cuda/emulated_device.cpp defines the same functions for the emulated device.
#pragma once

#include <cstdint>
#include <memory>

namespace moba::pytorch {

/// Returns whether a device type of torch's stable ABI is a CUDA device.
bool is_cuda_type(std::int32_t type);

/// Makes a device the current one for as long as the result lives.
std::shared_ptr<void> guard_device(std::int32_t device);

/// Returns the current stream of a device; throws ArgumentError if this torch was built without CUDA.
void* current_stream(std::int32_t device);

}  // namespace moba::pytorch
