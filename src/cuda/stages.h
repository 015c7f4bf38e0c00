#pragma once

#include "backend.h"
#include "cuda/geometry.h"
#include "cuda/runtime.h"

/// The stages on a device. Each launches its kernels on the queue and returns; what it reads and writes lies
/// in device memory that the flow (flow.cpp) has carved.
namespace moba::cuda {

/// One call, checked and normalised as moba::Call is: when top_k covers every block, there is one block as
/// long as the longest sequence.
struct Task {
  Tensor q{}, k{}, v{};
  Routing routing{};
  bool is_dense = false;
  std::int64_t requested_block_size = 0;  // before it was normalised
  float scale = 1;
  std::int64_t sequences = 0, max_seqlen_k = 0;
  std::int64_t tokens = 0, keys = 0;  // Tq, Tk
  std::int64_t q_heads = 0, kv_heads = 0, group = 1, head_dim = 0;
  /// Blocks that a row picks by score; 0 with `is_dense`. A causal row's own block goes without saying.
  std::int64_t width = 0;
  /// Entries of a row in the caller's lists.
  std::int64_t public_width = 0;

  bool needs_scores() const { return width > 0; }
  /// Whether rows attend to keys that the gate has no say in: their own block's, or all.
  bool has_diagonal() const { return routing.causal || is_dense; }
  /// Partial answers of a row: one for each picked block, then the near keys'.
  std::int64_t ranks() const { return width + (has_diagonal() ? 1 : 0); }
  /// No fewer than the sequences have together; how many those are, only the device knows.
  std::int64_t most_blocks() const { return keys / routing.block_size + sequences; }
  std::int64_t rows(const WorkSlice& part) const { return part.tokens() * group; }
  std::int64_t most_tiles(const WorkSlice& part) const {
    return divide_up(rows(part), kTileRows) + sequences + 1;
  }
};

/// Throws Error naming `function` where the backend, or the device it would run on, cannot do what is asked.
Task make_task(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
               const DeviceBatch& batch, const Routing& routing);
/// That a block of the device may have as much shared memory.
void check_shared(std::string_view function, std::int64_t head_dim, std::size_t bytes);
/// That `t` lies on the device in rows of 16-byte pieces.
void check_view(std::string_view function, const char* name, const Tensor& t);
/// That a list is device memory. Null is none.
void check_list(std::string_view function, const char* name, const void* list);

template <typename T>
View<T> view_of(const Tensor& t) {
  return {static_cast<T*>(t.data), t.strides[0], t.strides[1]};
}

/// Calls run.template operator()<T, head_dim>() for the task's element type and head dimension, which the
/// door has checked.
template <typename Run>
void with_type(const Task& task, Run&& run) {
  const auto with_head_dim = [&]<typename T>(T) {
    switch (task.head_dim) {
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
  if (task.q.dtype == DType::bf16) {
    with_head_dim(bfloat16{});
  } else {
    with_head_dim(float16{});
  }
}

/// Memory for what kernels know of the sequences.
struct Starts {
  std::int32_t *q = nullptr, *k = nullptr;  // where the caller's are on the host
  std::int32_t *blocks = nullptr, *tiles = nullptr;
};
Starts carve_starts(ArenaLayout& layout, const Task& task, const DeviceBatch& batch);

/// Brings the sequences' starts to the device, where they are not there yet, through the parameters of
/// launches: neither the copy nor a graph that captured it needs the host's memory later. Counts blocks and
/// query tiles.
Batch lay_out(Stream& stream, const Task& task, const DeviceBatch& batch, const WorkSlice& part,
              const Starts& starts);

/// Whether entries of a head's lists fit the 32 bits that they are kept in.
bool slots_are_countable(const Task& task, const WorkSlice& part);

/// Means of every block, rounded to the dtype of k: [heads of the part, most_blocks, D].
void centroids(Stream& stream, const Task& task, const WorkSlice& part, const Batch& batch, void* means);

}  // namespace moba::cuda
