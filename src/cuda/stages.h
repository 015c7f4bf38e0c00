#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "backend.h"
#include "cuda/geometry.h"
#include "cuda/runtime.h"

/// The stages on a device. Each launches its kernels on the stream and returns; inputs and outputs lie in
/// device memory that the flow (flow.cpp) has laid out.
namespace moba::cuda {

/// A checked call on a device. `max_seqlen_k` is at least 1.
struct DeviceCall : CallShape {
  Tensor q{}, k{}, v{};
  std::int64_t sequences = 0, keys = 0;  // keys: Tk
  /// Returns whether rows attend to keys without a score: those of their own block, or all.
  bool has_diagonal() const { return routing.causal || is_dense; }
  /// Partial results of a row: one for each selected block, then that of its diagonal keys.
  std::int64_t ranks() const { return width() + (has_diagonal() ? 1 : 0); }
  /// Returns whether rows have slots of partial results to merge, or none at all: a row of no block gets 0.
  bool merges() const { return width() > 0 || !has_diagonal(); }
  /// An upper bound of the blocks of all sequences; the device alone knows their number.
  std::int64_t max_blocks() const { return keys / routing.block_size + sequences; }
  std::int64_t rows(const WorkSlice& slice) const { return slice.tokens() * heads_per_kv; }
  std::int64_t max_tiles(const WorkSlice& slice) const {
    return divide_up(rows(slice), kTileRows) + sequences + 1;
  }
};

/// Throws ArgumentError if the backend, or the device that it would run on, does not support the call.
DeviceCall make_call(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
                     const Routing& routing);
/// Throws ArgumentError unless a block of the device may have as much shared memory.
void check_shared(std::int64_t head_dim, std::size_t bytes);
/// Throws ArgumentError unless `t` lies on the device in rows of whole 16-byte vectors.
void check_view(const char* name, const Tensor& t);
/// Throws ArgumentError unless `list` is device memory or null.
void check_list(const char* name, const void* list);

template <typename T>
View<T> view_of(const Tensor& t) {
  return {static_cast<T*>(t.data), t.strides[0], t.strides[1]};
}

/// Calls run.template operator()<T, head_dim>() for the call's element type and head dimension.
template <typename Run>
void with_type(const DeviceCall& call, Run&& run) {
  const auto with_head_dim = [&]<typename T>(T) {
    switch (call.head_dim) {
      case 64:
        return run.template operator()<T, 64>();
      case 96:
        return run.template operator()<T, 96>();
      case 128:
        return run.template operator()<T, 128>();
      default:
        return run.template operator()<T, 256>();
    }
  };
  if (call.q.dtype == DType::bf16) {
    with_head_dim(bfloat16{});
  } else {
    with_head_dim(float16{});
  }
}

/// Scratch memory of a call, unless told otherwise.
constexpr std::size_t kWorkspace = std::size_t{512} << 20;

/// Splits a call into slices whose scratch memory is within the budget and whose entries can be counted.
std::vector<WorkSlice> slices_of(const DeviceCall& call, const Execution& execution,
                                 const std::function<std::size_t(const WorkSlice&)>& bytes);

/// Runs `stages(stream, slice, memory)` for each slice of a call, in one arena whose parts `carve(layout,
/// slice)` assigns.
template <typename Carve, typename Stages>
void run_slices(const DeviceCall& call, const Execution& execution, const Carve& carve,
                const Stages& stages) {
  const auto bytes = [&](const WorkSlice& slice) {
    ArenaLayout layout;
    carve(layout, slice);
    return layout.used();
  };
  const std::vector<WorkSlice> slices = slices_of(call, execution, bytes);
  Stream stream(execution);
  const Arena arena(stream, bytes(slices.front()));
  for (const WorkSlice& slice : slices) {
    ArenaLayout layout(arena.data());
    stages(stream, slice, carve(layout, slice));
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(slices.front()));
}

/// Device memory for the offsets of the sequences.
struct Starts {
  std::int32_t *q = nullptr, *k = nullptr;  // copies of offsets that are on the host
  std::int32_t *blocks = nullptr, *tiles = nullptr;
};
Starts carve_starts(ArenaLayout& layout, const DeviceCall& call, const DeviceBatch& batch);

/// Copies offsets from the host to the device through the parameters of launches, so that neither the copy
/// nor a graph that captured it needs the host's memory later, and counts blocks and query tiles.
Batch lay_out(Stream& stream, const DeviceCall& call, const DeviceBatch& batch, const WorkSlice& slice,
              const Starts& starts);

/// Returns whether the entries of a head's lists can be counted in 32 bits.
bool slots_are_countable(const DeviceCall& call, const WorkSlice& slice);

/// Lays the caller's gate keys, call.k [blocks, heads, D], out as `centroids` does the means.
void lay_out_gate_keys(Stream& stream, const DeviceCall& call, const WorkSlice& slice, void* means);

/// Computes the means of all blocks, rounded to the dtype of k: [heads of the slice, max_blocks, D].
void centroids(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
               void* means);
/// Writes the features that have data, of all blocks and heads.
void features(Stream& stream, const DeviceCall& call, const Batch& batch, const BlockFeatures& features);

}  // namespace moba::cuda
