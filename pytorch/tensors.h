/// Tensors of torch as views of libmoba, through torch's stable ABI alone.
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

#include "moba/attention.h"

namespace moba::pytorch {

using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

/// A device, in the numbers of torch's stable ABI.
struct Place {
  std::int32_t type = aoti_torch_device_type_cpu();
  std::int32_t index = 0;

  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator==(const Place&) const = default;
};

inline Place place_of(const TorchTensor& t) {
  if (t.is_cpu()) return {};
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &place.type));
  place.index = t.get_device_index();
  return place;
}

inline void require_place(const std::string& function, const char* name, const TorchTensor& t,
                          const Place& place) {
  if (place_of(t) != place) throw Error(function + ": " + name + " is not on the device where q is");
}

inline TorchTensor empty(const std::vector<std::int64_t>& sizes, ScalarType dtype, const Place& place) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<std::int64_t>(sizes[dim], 1);
  AtenTensorHandle handle = nullptr;
  const auto number = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), number, place.type, place.index, &handle));
  return TorchTensor(handle);
}

inline TorchTensor bytes_of(std::size_t bytes, const Place& place) {
  return empty({static_cast<std::int64_t>(bytes)}, ScalarType::Byte, place);
}

inline std::string sizes_text(const TorchTensor& t) {
  std::string text = "[";
  for (std::int64_t dim = 0; dim < t.dim(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(t.size(dim));
  }
  return text + "]";
}

inline DType dtype_of(const std::string& function, const char* name, const TorchTensor& t) {
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
      throw Error(function + ": " + name + " is " + torch::headeronly::toString(t.scalar_type()) +
                  "; float32, bfloat16, float16 or float64 is expected");
  }
}

/// A tensor that libmoba can walk, and its view: strides are taken as they are, except that a last dimension
/// that is not contiguous is copied, and on a CUDA device rows that do not begin on 16 bytes.
class Argument {
 public:
  Argument(const std::string& function, const char* name, const TorchTensor& given, const Place& place)
      : tensor_(given) {
    require_place(function, name, given, place);
    if (given.dim() != 3) {
      throw Error(function + ": " + name + " has sizes " + sizes_text(given) +
                  "; [tokens, heads, head_dim] is expected");
    }
    view_.dtype = pytorch::dtype_of(function, name, given);
    if (!can_be_walked(given, place)) {
      tensor_ = empty({given.size(0), given.size(1), given.size(2)}, given.scalar_type(), place);
      torch::stable::copy_(tensor_, given);
    }
    view_.data = tensor_.data_ptr();
    view_.device = place.is_cuda() ? Device::cuda : Device::cpu;
    view_.rank = 3;
    for (std::size_t dim = 0; dim < 3; ++dim) {
      view_.sizes[dim] = tensor_.size(static_cast<std::int64_t>(dim));
      view_.strides[dim] = tensor_.stride(static_cast<std::int64_t>(dim));
    }
    view_.strides[2] = 1;  // what an empty tensor says of itself means nothing
  }

  const Tensor& view() const { return view_; }
  const TorchTensor& tensor() const { return tensor_; }

 private:
  bool can_be_walked(const TorchTensor& t, const Place& place) const {
    if (t.size(2) > 1 && t.stride(2) != 1) return false;
    constexpr std::int64_t kRow = 16;
    const auto bytes = static_cast<std::int64_t>(size_of(view_.dtype));
    return !place.is_cuda() || (reinterpret_cast<std::uintptr_t>(t.data_ptr()) % kRow == 0 &&
                                t.stride(0) * bytes % kRow == 0 && t.stride(1) * bytes % kRow == 0);
  }

  TorchTensor tensor_;
  Tensor view_{};
};

inline TorchTensor empty_like(const Argument& model, const Place& place) {
  const auto& sizes = model.view().sizes;
  return empty({sizes[0], sizes[1], sizes[2]}, model.tensor().scalar_type(), place);
}

/// Throws unless `t` is int32 [sequences + 1] on that device.
inline void check_offsets(const std::string& function, const char* name, const TorchTensor& t,
                          const Place& place) {
  require_place(function, name, t, place);
  if (t.dim() != 1 || t.scalar_type() != ScalarType::Int) {
    throw Error(function + ": " + name + " is " + torch::headeronly::toString(t.scalar_type()) + " " +
                sizes_text(t) + "; int32 [sequences + 1] is expected");
  }
}

/// What every call has, wherever its tensors are.
struct Call {
  std::string function;
  Routing routing{};
  Place place{};

  /// Entries of a row of the operator's selection. Known from shapes alone, as torch.compile needs it, and so
  /// at least as many as libmoba writes, whose rows are only as long as the longest sequence asks for.
  std::int64_t width(std::int64_t keys) const {
    if (routing.block_size < 1 || routing.top_k < 1) return 0;  // refused behind the door
    return std::min(routing.top_k, keys == 0 ? 0 : (keys - 1) / routing.block_size + 1);
  }
};

}  // namespace moba::pytorch
