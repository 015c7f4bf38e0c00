#pragma once

#include "moba/attention.h"

/// Calls on a CUDA device whose sequences are delimited there too. Every other call takes CUDA tensors as it
/// takes the CPU's: views, `lse` and `selection` all on the device, work on `Execution::stream` and never
/// waited for, so that a call can be captured into a CUDA graph. `Execution::scratch`, if given, must give
/// device memory that is safe to reuse in the stream's order.
namespace moba {

/// `Sequences` in device memory. What the host has to know of them are bounds, and they may be generous.
struct DeviceSequences {
  /// [count + 1] each, as `Sequences` describes them. They are read by the device, so nothing checks them.
  const std::int32_t* q = nullptr;
  const std::int32_t* k = nullptr;
  std::int64_t count = 0;
  /// At least the keys of the longest sequence.
  std::int64_t longest = 0;
};

/// min(top_k, blocks of `longest` keys): the width of lists of selected blocks.
MOBA_EXPORT std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing);

MOBA_EXPORT void attention(const Tensor& q, const Tensor& k, const Tensor& v,
                           const DeviceSequences& sequences, const Routing& routing, const Outputs& outputs,
                           const Execution& execution = {});

/// What a saved selection lists and the device can tell to be none of a query's blocks is passed over:
/// nothing comes back from there to throw an error.
MOBA_EXPORT void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Saved& saved, const DeviceSequences& sequences,
                                    const Routing& routing, const Gradients& gradients,
                                    const Execution& execution = {});

MOBA_EXPORT void select_blocks(const Tensor& q, const Tensor& k, const DeviceSequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {});

}  // namespace moba
