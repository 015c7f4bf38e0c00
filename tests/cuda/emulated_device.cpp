// Replaces torch's CUDA devices by the emulated device: torch's CPU tensors, which the backend of mirror.cpp
// copies to and fro.
#include "device.h"

namespace moba::pytorch {

bool is_cuda_type(std::int32_t) {
  return true;
}

std::shared_ptr<void> guard_device(std::int32_t) {
  return nullptr;
}

void* current_stream(std::int32_t) {
  return nullptr;
}

}  // namespace moba::pytorch
