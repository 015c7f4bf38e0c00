#pragma once

#include <span>
#include <string>
#include <string_view>

#include "call.h"
#include "moba/cuda.h"

namespace moba {

/// What `attend` writes, and what its gradient reads and writes: the public structs, checked.
struct Backward {
  Tensor d_out;
  Tensor out;
  const float* lse = nullptr;
  Gradients gradients;
};

/// The means to work with: threads, scratch memory.
struct Context {
  const Parallel& parallel;
  Scratch& scratch;
  std::size_t budget;
};

/// The sequences of a call on a device: their starts, wherever they are.
struct DeviceBatch {
  const std::int32_t *q_starts = nullptr, *k_starts = nullptr;  // [count + 1]
  std::int64_t count = 0;
  std::int64_t max_seqlen_k = 0;  // no fewer than the keys of any sequence
  bool on_device = false;         // the starts; on the host they are read before the call returns
};

/// A backend on a device walks the stages itself, on its stream and without waiting for it: sizes that only
/// the device knows never come back. Checks what it cannot solve before it launches anything.
struct DeviceFlow {
  /// Without `outputs.out`, the routing alone.
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

/// One implementation of the six stages. The reference, CPU and CUDA tables are all there are;
/// `choose_backend` picks.
struct Backend {
  std::string_view name;
  /// Why this build cannot run it; empty when it can.
  std::string_view missing{};
  /// Set: the flow of a device, and nothing below.
  const DeviceFlow* device = nullptr;
  /// Why this backend cannot solve the call; empty when it can.
  std::string (*refuses)(const Call& call) = nullptr;
  /// Scratch bytes that the stages below take for a group of this shape.
  std::size_t (*workspace)(const Call& call, const WorkSlice& group, int threads) = nullptr;

  BlockMeans (*centroids)(const Call& call, std::int64_t head0, std::int64_t head1,
                          Context& context) = nullptr;
  Selection (*gate)(const Call& call, const BlockMeans& means, const WorkSlice& group,
                    Context& context) = nullptr;
  Plan (*plan)(const Call& call, const Selection& selection, Context& context) = nullptr;
  void (*attend)(const Call& call, const Selection& selection, const Plan& plan, const Outputs& outputs,
                 Context& context) = nullptr;
  /// The same with the ranges that `attend_backward` wants.
  Plan (*plan_backward)(const Call& call, const Selection& selection, Context& context) = nullptr;
  /// Adds nothing: writes dq of the group's queries and heads, and dk, dv of the group's heads. The group
  /// spans all tokens.
  void (*attend_backward)(const Call& call, const Selection& selection, const Plan& plan,
                          const Backward& backward, Context& context) = nullptr;
  std::size_t (*workspace_backward)(const Call& call, const WorkSlice& group, int threads) = nullptr;
  /// One query a sequence; `means` are the cache's.
  void (*decode)(const Call& call, const BlockMeans& means, const Outputs& outputs,
                 Context& context) = nullptr;
};

extern const Backend reference_backend;
extern const Backend cpu_backend;
extern const Backend cuda_backend;

/// Scratch memory of a host backend, unless told otherwise.
constexpr std::size_t kHostWorkspace = std::size_t{256} << 20;

/// The backend of that name, or by MOBA_BACKEND, or the default of the device. Throws ArgumentError
/// when there is none.
const Backend& named_backend(const std::string& name, Device device);
DeviceBatch batch_of(const Sequences& sequences);
DeviceBatch batch_of(const DeviceSequences& sequences);

/// The same for a call on the host. Throws also when the backend refuses it.
const Backend& choose_backend(const std::string& name, const Call& call);

}  // namespace moba
