#include "device.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "src/errors.h"

namespace moba::pytorch {

bool is_cuda_type(std::int32_t type) {
  return type == aoti_torch_device_type_cuda();
}

std::shared_ptr<void> guard_device(std::int32_t device) {
  return std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
}

/// Looks up the function of torch's stable ABI when the first CUDA tensor arrives: only CUDA builds of torch
/// have it.
void* current_stream(std::int32_t device) {
  using GetStream = AOTITorchError (*)(std::int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get_stream == nullptr)
    refuse("q", "expected a torch built with CUDA, got one without libtorch_cuda.so");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

}  // namespace moba::pytorch
