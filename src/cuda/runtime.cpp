#include "cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <bit>

#include "cuda/architectures.h"
#include "errors.h"

namespace moba::cuda {
namespace {

/// Throws when a call of the runtime failed, and clears its error so that the next call does not see it.
void require(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw DeviceFailure{"CUDA: " + what + ": " + cudaGetErrorString(status)};
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, which, device),
          "device attribute " + std::to_string(which) + " cannot be read");
  return value;
}

/// The driver's function is looked up by name, so that the library needs no driver to be loaded.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
  constexpr unsigned kVersion = 12000;
  require(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion, cudaEnableDefault,
                                           &status),
          "cuTensorMapEncodeTiled cannot be looked up");
  if (status != cudaDriverEntryPointSuccess || found == nullptr)
    throw DeviceFailure{"CUDA: the driver has no tensor maps"};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

/// Returns whether the code of a kernel, which may be an older architecture's, has griddepcontrol.
bool waits_for_grids(const void* kernel) {
  cudaFuncAttributes attributes{};
  require(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel cannot be read");
  constexpr int kFirst = 90;
  return attributes.ptxVersion >= kFirst;
}

}  // namespace

Hardware current_hardware() {
  int device = 0;
  require(cudaGetDevice(&device), "no device can be used");
  return {
      .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
      .capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                    attribute(cudaDevAttrComputeCapabilityMinor, device),
      .shared_bytes = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
}

std::string_view built_architectures() {
  return MOBA_CUDA_ARCHITECTURES;
}

bool is_on_device(const void* pointer) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

TensorMap tensor_map(const Tensor& t, int rows) {
  static const auto encode = tensor_map_encoder();

  const std::array<cuuint64_t, 3> sizes{static_cast<cuuint64_t>(t.sizes[2]),
                                        static_cast<cuuint64_t>(t.sizes[1]),
                                        static_cast<cuuint64_t>(t.sizes[0])};
  const std::array<cuuint64_t, 2> strides{2 * static_cast<cuuint64_t>(t.strides[1]),
                                          2 * static_cast<cuuint64_t>(t.strides[0])};
  const std::array<cuuint32_t, 3> box{TensorMap::kColumns, 1, static_cast<cuuint32_t>(rows)};
  const std::array<cuuint32_t, 3> steps{1, 1, 1};
  alignas(64) CUtensorMap map{};
  const CUresult result = encode(
      &map, t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      box.size(), t.data, sizes.data(), strides.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw DeviceFailure{"CUDA: no tensor map of " + std::to_string(t.sizes[0]) + " x " +
                        std::to_string(t.sizes[1]) + " x " + std::to_string(t.sizes[2]) +
                        " elements: error " + std::to_string(result)};
  }
  return std::bit_cast<TensorMap>(map);
}

void launch_kernel(const Launch& launch, const void* kernel, void** arguments) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (launch.shared > kWithoutAsking) {
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(launch.shared)),
            std::string("kernel ") + launch.name + " cannot have " + std::to_string(launch.shared) +
                " bytes of shared memory");
  }
  cudaLaunchAttribute programmatic{};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(launch.grid.x), static_cast<unsigned>(launch.grid.y)};
  config.blockDim = {static_cast<unsigned>(launch.threads)};
  config.dynamicSmemBytes = launch.shared;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &programmatic;
  config.numAttrs = launch.is_dependent && waits_for_grids(kernel) ? 1 : 0;
  require(cudaLaunchKernelExC(&config, kernel, arguments),
          std::string("kernel ") + launch.name + " cannot be launched");
}

void Stream::fill(void* to, int value, std::size_t bytes) {
  require(cudaMemsetAsync(to, value, bytes, static_cast<cudaStream_t>(stream_)), "memory cannot be set");
}

std::byte* Stream::allocate(std::size_t bytes) {
  void* memory = nullptr;
  if (scratch_->allocate) {
    memory = scratch_->allocate(bytes);
    if (memory == nullptr)
      throw DeviceFailure{"scratch gave no memory for " + std::to_string(bytes) + " bytes"};
  } else if (bytes > 0) {
    require(cudaMallocAsync(&memory, bytes, static_cast<cudaStream_t>(stream_)),
            "no " + std::to_string(bytes) + " bytes of device memory");
  }
  return static_cast<std::byte*>(memory);
}

void Stream::release(std::byte* memory, std::size_t bytes) noexcept {
  if (memory == nullptr) return;
  if (scratch_->release) {
    scratch_->release(memory, bytes);
  } else if (cudaFreeAsync(memory, static_cast<cudaStream_t>(stream_)) != cudaSuccess) {
    cudaGetLastError();
  }
}

}  // namespace moba::cuda
