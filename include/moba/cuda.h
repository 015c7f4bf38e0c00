#pragma once

#include "moba/attention.h"

/// Calls with offsets in device memory. Every other call takes CUDA tensors as it takes the CPU's:
/// views, `lse` and `selection` all on the device. Work is queued on `Execution::stream` and never waited
/// for, so a call can be captured into a CUDA graph. `Execution::scratch`, if given, must return device
/// memory that is safe to reuse in the stream's order.
namespace moba {

/// `Sequences` in device memory, with the bounds that the host needs.
struct DeviceSequences {
  /// [count + 1] each, as in `Sequences`. Read by the device, hence not checked.
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t* cu_seqlens_k = nullptr;
  std::int64_t count = 0;
  /// At least the keys of the longest sequence.
  std::int64_t max_seqlen_k = 0;
};

/// Width of a row of a selection: min(top_k, blocks of `max_seqlen_k` keys).
MOBA_EXPORT std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing);

/// `attention` with the sequences' offsets in device memory.
MOBA_EXPORT void attention(const Tensor& q, const Tensor& k, const Tensor& v,
                           const DeviceSequences& sequences, const Routing& routing, const Outputs& outputs,
                           const Execution& execution = {});

/// `attention_backward` with the sequences' offsets in device memory. Ignores entries of a saved selection
/// that are not blocks of their query: the device cannot throw.
MOBA_EXPORT void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Saved& saved, const DeviceSequences& sequences,
                                    const Routing& routing, const Gradients& gradients,
                                    const Execution& execution = {});

/// `select_blocks` with the sequences' offsets in device memory.
MOBA_EXPORT void select_blocks(const Tensor& q, const Tensor& k, const DeviceSequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {}, std::int64_t selection_stride = 0);

/// `select_blocks` by gate inputs, with the sequences' offsets in device memory. The gate keys are of the
/// dtype of the queries, a row for every block, incomplete ones included: the offsets must not count more.
MOBA_EXPORT void select_blocks(const GateInputs& gate, const DeviceSequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {}, std::int64_t selection_stride = 0);

}  // namespace moba
