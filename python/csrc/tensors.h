/// Views of torch's tensors, through its stable ABI alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "device.h"
#include "moba/attention.h"
#include "moba/cuda.h"
#include "src/errors.h"

namespace moba::pytorch {

using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

/// A device, in the numbers of torch's stable ABI.
struct TorchDevice {
  std::int32_t type = aoti_torch_device_type_cpu();
  std::int32_t index = 0;

  bool is_cuda() const { return is_cuda_type(type); }
  bool operator==(const TorchDevice&) const = default;

  /// Returns "cpu", "cuda:1" or, for other types, "device 10:0" in the numbers of torch's stable ABI.
  std::string text() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    const std::string name =
        type == aoti_torch_device_type_cuda() ? "cuda" : "device " + std::to_string(type);
    return name + ":" + std::to_string(index);
  }
};

inline TorchDevice device_of(const TorchTensor& t) {
  if (t.is_cpu()) return {};
  TorchDevice device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  device.index = t.get_device_index();
  return device;
}

/// Throws ArgumentError unless `t` is on that device.
inline void require_device(const char* name, const TorchTensor& t, const TorchDevice& device) {
  if (device_of(t) != device)
    refuse(name, "expected device ", device.text(), " (that of q), got ", device_of(t).text());
}

/// Returns a new contiguous tensor, uninitialised.
inline TorchTensor empty(const std::vector<std::int64_t>& sizes, ScalarType dtype,
                         const TorchDevice& device) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<std::int64_t>(sizes[dim], 1);
  AtenTensorHandle handle = nullptr;
  const auto number = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), number, device.type, device.index,
                                                  &handle));
  return TorchTensor(handle);
}

inline TorchTensor bytes_of(std::size_t bytes, const TorchDevice& device) {
  return empty({static_cast<std::int64_t>(bytes)}, ScalarType::Byte, device);
}

inline std::string sizes_text(const TorchTensor& t) {
  std::string text = "[";
  for (std::int64_t dim = 0; dim < t.dim(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(t.size(dim));
  }
  return text + "]";
}

inline DType dtype_of(const char* name, const TorchTensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      refuse(name, "expected float32, bfloat16, float16 or float64, got ",
             torch::headeronly::toString(t.scalar_type()));
  }
}

/// A tensor argument and its view, [tokens, heads, head_dim], or of rank 4 [sequences, tokens, heads,
/// head_dim]. Strides are kept; a tensor is copied if its last dimension is not contiguous or, on a CUDA
/// device, if its rows are not aligned to 16 bytes.
class Argument {
 public:
  Argument(const char* name, const TorchTensor& given, const TorchDevice& device, int rank = 3)
      : tensor_(given) {
    require_device(name, given, device);
    if (given.dim() != rank) {
      refuse(name, "expected ", rank == 3 ? "[tokens" : "[sequences, tokens or blocks",
             ", heads, head_dim], got sizes ", sizes_text(given));
    }
    view_.dtype = pytorch::dtype_of(name, given);
    if (!has_usable_strides(given, device)) {
      std::vector<std::int64_t> sizes;
      sizes.reserve(static_cast<std::size_t>(rank));
      for (int dim = 0; dim < rank; ++dim) sizes.push_back(given.size(dim));
      tensor_ = empty(sizes, given.scalar_type(), device);
      torch::stable::copy_(tensor_, given);
    }
    view_.data = tensor_.data_ptr();
    view_.device = device.is_cuda() ? Device::cuda : Device::cpu;
    view_.rank = rank;
    for (int dim = 0; dim < rank; ++dim) {
      const auto at = static_cast<std::size_t>(dim);
      view_.sizes[at] = tensor_.size(dim);
      view_.strides[at] = stride_of(tensor_, dim);
    }
    view_.strides[static_cast<std::size_t>(rank) - 1] = 1;  // an empty tensor's own stride is arbitrary
  }

  const Tensor& view() const { return view_; }
  const TorchTensor& tensor() const { return tensor_; }

 private:
  bool has_usable_strides(const TorchTensor& t, const TorchDevice& device) const {
    const std::int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) return false;
    if (!device.is_cuda()) return true;
    constexpr std::int64_t kRowAlignment = 16;
    const auto bytes = static_cast<std::int64_t>(size_of(view_.dtype));
    bool aligned = reinterpret_cast<std::uintptr_t>(t.data_ptr()) % kRowAlignment == 0;
    for (std::int64_t dim = 0; dim < last; ++dim)
      aligned = aligned && stride_of(t, dim) * bytes % kRowAlignment == 0;
    return aligned;
  }

  /// Stride of a dimension; 0 for a batch of one, whose stride is arbitrary.
  static std::int64_t stride_of(const TorchTensor& t, std::int64_t dim) {
    return dim == 0 && t.dim() == 4 && t.size(0) == 1 ? 0 : t.stride(dim);
  }

  TorchTensor tensor_;
  Tensor view_{};
};

/// Returns a new contiguous tensor of the sizes and dtype of an argument of rank 3.
inline TorchTensor empty_like(const Argument& model, const TorchDevice& device) {
  const auto& sizes = model.view().sizes;
  return empty({sizes[0], sizes[1], sizes[2]}, model.tensor().scalar_type(), device);
}

/// Throws ArgumentError unless `t` is int32 [sequences + 1] on that device.
inline void check_offsets(const char* name, const TorchTensor& t, const TorchDevice& device) {
  require_device(name, t, device);
  if (t.dim() != 1 || t.scalar_type() != ScalarType::Int) {
    refuse(name, "expected int32 [sequences + 1], got ", torch::headeronly::toString(t.scalar_type()), " ",
           sizes_text(t));
  }
}

/// State of a call, common to all devices.
struct OperatorCall {
  Routing routing{};
  TorchDevice device{};

  /// Returns the width of a row of the operator's selection, from shapes alone, as torch.compile needs it:
  /// that of `keys` packed keys in one sequence, the longest that the batch may hold.
  std::int64_t width(std::int64_t keys) const {
    if (routing.block_size < 1 || routing.top_k < 1) return 0;  // refused by the library
    return selection_width(DeviceSequences{.max_seqlen_k = keys}, routing);
  }
};

}  // namespace moba::pytorch
