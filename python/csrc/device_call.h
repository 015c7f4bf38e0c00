/// Calls on a CUDA device: on PyTorch's current stream, with memory from its allocator, without
/// synchronising.
#pragma once

#include <limits>
#include <memory>

#include "device.h"
#include "moba/cuda.h"
#include "tensors.h"

namespace moba::pytorch {

/// Returns the CUDA device of q; throws ArgumentError if q is on another device or libmoba was built without
/// its CUDA backend.
inline TorchDevice cuda_device_of(const TorchTensor& q) {
  const std::vector<std::string> built = backends();
  if (std::find(built.begin(), built.end(), "cuda") == built.end()) {
    refuse("q",
           "expected a CPU tensor, got a CUDA one: this package was built without CUDA (pip install . "
           "-Ccmake.define.MOBA_BUILD_CUDA=ON builds it in)");
  }
  const TorchDevice device = device_of(q);
  if (!device.is_cuda()) refuse("q", "expected a CUDA tensor, got one on ", device.text());
  return device;
}

/// A call on a CUDA device. Offsets stay on the device, unread; the number of packed keys bounds the longest
/// sequence.
class DeviceCall : public OperatorCall {
 public:
  DeviceSequences sequences{};

  DeviceCall(const Routing& call_routing, const TorchTensor& q, const TorchTensor& k,
             const TorchTensor& cu_seqlens_q, const TorchTensor& cu_seqlens_k)
      : DeviceCall(call_routing, q) {
    const std::int32_t* q_starts = list("cu_seqlens_q", cu_seqlens_q);
    const std::int32_t* k_starts = list("cu_seqlens_k", cu_seqlens_k);
    if (cu_seqlens_q.size(0) == 0)
      refuse("cu_seqlens_q", "expected at least one entry (0), got an empty list");
    if (cu_seqlens_q.size(0) != cu_seqlens_k.size(0)) {
      refuse("cu_seqlens_k", "expected ", cu_seqlens_q.size(0), " entries (as cu_seqlens_q), got ",
             cu_seqlens_k.size(0));
    }
    sequences = {.cu_seqlens_q = q_starts,
                 .cu_seqlens_k = k_starts,
                 .count = cu_seqlens_q.size(0) - 1,
                 .max_seqlen_k = k.dim() > 0 ? k.size(0) : 0};
  }
  DeviceCall(const Routing& call_routing, const TorchTensor& q)
      : OperatorCall{call_routing, cuda_device_of(q)}, guard_(guard_device(device.index)) {}

  /// Returns the elements of a one-dimensional int32 tensor, made contiguous for the duration of the call.
  const std::int32_t* list(const char* name, const TorchTensor& t) {
    check_offsets(name, t, device);
    lists_.push_back(t.size(0) > 1 && t.stride(0) != 1 ? torch::stable::contiguous(t) : t);
    return static_cast<const std::int32_t*>(lists_.back().data_ptr());
  }

  /// Bounds the longest sequence by the blocks of gate inputs.
  void count_blocks(std::int64_t blocks) {
    constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
    const std::int64_t block_size = std::max<std::int64_t>(routing.block_size, 1);
    sequences.max_seqlen_k = blocks > kMax / block_size ? kMax : blocks * block_size;
  }

  /// The device alone reads lists, so nothing is checked, and the longest length is at most `bound`.
  static void check_spans(const std::int32_t*, const std::int32_t*, std::int64_t, std::int64_t) {}
  static std::int64_t max_length(const std::int32_t*, std::int64_t, std::int64_t bound) { return bound; }

  Execution execution(const std::string& backend, DType) {
    Execution execution;
    execution.backend = backend;
    execution.stream = current_stream(device.index);
    execution.scratch = {
        [this](std::size_t bytes) { return held_.emplace_back(bytes_of(bytes, device)).data_ptr(); },
        [this](void* memory, std::size_t) {
          std::erase_if(held_, [&](const TorchTensor& t) { return t.data_ptr() == memory; });
        }};
    return execution;
  }

 private:
  std::shared_ptr<void> guard_;
  std::vector<TorchTensor> lists_{}, held_{};
};

}  // namespace moba::pytorch
