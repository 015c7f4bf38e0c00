#pragma once

#include <span>
#include <string>
#include <string_view>

#include "call.h"
#include "moba/cuda.h"

namespace moba {

/// Inputs and outputs of a backward pass beside q, k and v: the public structs, checked.
struct Backward {
  Tensor d_out;
  Tensor out;
  const float* lse = nullptr;
  Gradients gradients;
};

/// Execution context of a host backend.
struct Context {
  const Parallel& parallel;
  Scratch& scratch;
  std::size_t budget;
};

/// Sequences of a call on a device, with offsets on the host or the device.
struct DeviceBatch {
  const std::int32_t *q_starts = nullptr, *k_starts = nullptr;  // [count + 1]
  std::int64_t count = 0;
  std::int64_t max_seqlen_k = 0;  // at least the keys of the longest sequence
  bool on_device = false;         // the offsets; on the host they are read before the call returns
};

/// Operations of a device backend. They run the stages on a stream without waiting for it, so sizes that only
/// the device knows never reach the host, and check their arguments before they launch anything.
struct DeviceFlow {
  /// Computes the selection alone if `outputs.out` has no data.
  void (*attention)(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
                    const Routing& routing, const Outputs& outputs, const Execution& execution);
  void (*attention_backward)(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                             const Gradients& gradients, const Execution& execution);
  void (*decode)(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
                 const Execution& execution);
  void (*update_means)(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                       std::int64_t max_added, const Execution& execution);
};

/// Table of operations of a backend: those of a device, or the six stages and their workspace. The reference,
/// CPU and CUDA tables are all there are; `choose_backend` selects one.
struct Backend {
  std::string_view name;
  /// Reason why this build lacks the backend; empty if it has it.
  std::string_view missing{};
  /// Operations of a device backend; null for a host backend, which has the operations below.
  const DeviceFlow* device = nullptr;
  /// Returns the reason why this backend does not support the call; empty if it does.
  std::string (*refuses)(const Call& call) = nullptr;
  /// Scratch bytes of the forward stages for a slice.
  std::size_t (*workspace)(const Call& call, const WorkSlice& slice, int threads) = nullptr;

  BlockMeans (*centroids)(const Call& call, std::int64_t head0, std::int64_t head1,
                          Context& context) = nullptr;
  /// Writes the rows of `selection`. Called only if the call needs scores.
  void (*gate)(const Call& call, const BlockMeans& means, const Selection& selection,
               Context& context) = nullptr;
  Plan (*plan)(const Call& call, const Selection& selection, Context& context) = nullptr;
  void (*attend)(const Call& call, const Selection& selection, const Plan& plan, const Outputs& outputs,
                 Context& context) = nullptr;
  /// The same, with the ranges of `attend_backward`.
  Plan (*plan_backward)(const Call& call, const Selection& selection, Context& context) = nullptr;
  /// Overwrites (does not accumulate) dq, dk and dv of the slice's heads. The slice spans all tokens.
  void (*attend_backward)(const Call& call, const Selection& selection, const Plan& plan,
                          const Backward& backward, Context& context) = nullptr;
  std::size_t (*workspace_backward)(const Call& call, const WorkSlice& slice, int threads) = nullptr;
  /// Decodes one query for every sequence; `means` are the cache's.
  void (*decode)(const Call& call, const BlockMeans& means, const Outputs& outputs,
                 Context& context) = nullptr;
};

extern const Backend reference_backend;
extern const Backend cpu_backend;
extern const Backend cuda_backend;

/// Scratch memory of a host backend, unless told otherwise.
constexpr std::size_t kHostWorkspace = std::size_t{256} << 20;

/// Returns the backend `name`; if empty, that of MOBA_BACKEND, or the device's default. Throws ArgumentError
/// if this build has none of that name.
const Backend& named_backend(const std::string& name, Device device);
DeviceBatch batch_of(const Sequences& sequences);
DeviceBatch batch_of(const DeviceSequences& sequences);

/// The same for a call on the host. Throws also if the backend does not support the call.
const Backend& choose_backend(const std::string& name, const Call& call);

}  // namespace moba
