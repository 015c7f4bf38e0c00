#pragma once

#include <algorithm>
#include <atomic>
#include <span>
#include <string>
#include <string_view>

#include "call.h"
#include "moba/cache.h"
#include "moba/cuda.h"

namespace moba {

/// Inputs and outputs of a backward pass beside q, k and v: the public structs, checked.
struct Backward {
  Tensor d_out;
  Tensor out;
  const float* lse = nullptr;
  Gradients gradients;
};

/// Features of one block at one kv head, D values each. `max` and `min` may be null.
struct FeatureRows {
  float *mean = nullptr, *max = nullptr, *min = nullptr;
};

/// New keys and values of one sequence of a cache, and the pages and means that take them.
struct Append {
  Tensor k{}, v{};         // [n, Hkv, D], n > 0
  std::int64_t first = 0;  // position of the first of them
  KvLayout k_layout{}, v_layout{};
  std::span<const std::byte*const> k_pages{}, v_pages{};  // of the whole sequence
  std::int64_t block_size = 1;
  /// [blocks, Hkv, D]: the sum of the keys of each block that is being filled, the mean of each that is full.
  float* means = nullptr;
  float *max = nullptr, *min = nullptr;  // as `means`; may be null

  /// The new tokens [first, last) of a block, counted from the first new one.
  std::pair<std::int64_t, std::int64_t> tokens_of(std::int64_t block) const {
    return {std::max<std::int64_t>(block * block_size - first, 0),
            std::min((block + 1) * block_size - first, k.sizes[0])};
  }
  /// The features of a block that are kept.
  FeatureRows features_of(std::int64_t block, std::int64_t head) const {
    const std::int64_t offset = (block * k.sizes[1] + head) * k.sizes[2];
    return {means + offset, max == nullptr ? nullptr : max + offset, min == nullptr ? nullptr : min + offset};
  }
  /// Whether the first token of the block is among the new ones.
  bool begins(std::int64_t block) const { return first <= block * block_size; }
  /// Whether the block is full once the new tokens are in it.
  bool completes(std::int64_t block) const { return (block + 1) * block_size <= first + k.sizes[0]; }
};

/// Where a token's key or value lies in a page of a cache.
struct CacheRow {
  std::byte* data = nullptr;
  float* scale = nullptr;  // i8 alone
};
inline CacheRow cache_row(const KvLayout& layout, std::span<const std::byte* const> pages,
                          std::int64_t position, std::int64_t head) {
  auto* page = const_cast<std::byte*>(pages[static_cast<std::size_t>(position / layout.page_tokens)]) +
               layout.page_offset;
  const std::int64_t slot = head * layout.page_tokens + position % layout.page_tokens;
  return {page + slot * layout.token_stride * static_cast<std::int64_t>(size_of(layout.dtype)),
          layout.scale_offset == 0 ? nullptr : reinterpret_cast<float*>(page + layout.scale_offset) + slot};
}

/// Returns the threads of a call: OpenMP's, unless it names others.
inline Parallel threads_of(const Execution& execution) {
  return execution.parallel.run ? execution.parallel : openmp();
}

/// Execution::cancelled, which stays true once it was.
class Cancel {
 public:
  explicit Cancel(const std::function<bool()>& cancelled) : cancelled_(cancelled) {}

  bool can_happen() const { return static_cast<bool>(cancelled_); }
  bool operator()() {
    if (can_happen() && !happened_.load(std::memory_order_relaxed) && cancelled_()) happened_ = true;
    return happened_.load(std::memory_order_relaxed);
  }

 private:
  const std::function<bool()>& cancelled_;
  std::atomic<bool> happened_{false};
};

/// Execution context of a host backend. Tasks of `parallel` are skipped after `cancelled`; those that take
/// long also ask by themselves.
struct Context {
  const Parallel& parallel;
  Scratch& scratch;
  std::size_t budget;
  Cancel& cancelled;
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
  void (*select)(const GateInputs& gate, const DeviceBatch& batch, const Routing& routing,
                 const Outputs& outputs, const Execution& execution);
  void (*features)(const Tensor& k, const DeviceBatch& batch, std::int64_t block_size,
                   const BlockFeatures& features, const Execution& execution);
  void (*attention_backward)(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                             const Gradients& gradients, const Execution& execution);
  void (*decode)(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
                 const Execution& execution);
  void (*update_means)(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                       std::int64_t max_added, const Execution& execution);
};

/// Table of operations of a backend: those of a device, or the stages and their workspace. The reference,
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

  /// Stores the new rows of one block at one kv head, and adds its keys to the block's sum in token order; a
  /// full block's sum becomes its mean. Keeps the extremes of stored keys where there is room for them.
  void (*append)(const Append& rows, std::int64_t block, std::int64_t head) = nullptr;

  BlockMeans (*centroids)(const Call& call, std::int64_t head0, std::int64_t head1,
                          Context& context) = nullptr;
  /// Computes features of one block at one kv head; the mean has the bits of `centroids`.
  void (*features)(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t block,
                   const FeatureRows& to) = nullptr;
  /// Writes the rows of `selection`. Called only if the call needs scores.
  void (*gate)(const Call& call, const BlockMeans& means, const SliceSelection& selection,
               Context& context) = nullptr;
  Plan (*plan)(const Call& call, const SliceSelection& selection, Context& context) = nullptr;
  void (*attend)(const Call& call, const SliceSelection& selection, const Plan& plan, const Outputs& outputs,
                 Context& context) = nullptr;
  /// The same, with the ranges of `attend_backward`.
  Plan (*plan_backward)(const Call& call, const SliceSelection& selection, Context& context) = nullptr;
  /// Overwrites (does not accumulate) dq, dk and dv of the slice's heads. The slice spans all tokens.
  void (*attend_backward)(const Call& call, const SliceSelection& selection, const Plan& plan,
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

/// The same for a backend that works on the host's memory.
const Backend& host_backend(const std::string& name);
/// The same for a call on the host. Throws also if the backend does not support the call.
const Backend& choose_backend(const std::string& name, const Call& call);

}  // namespace moba
