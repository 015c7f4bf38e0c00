#pragma once

#include "moba/attention.h"

/// Calls with offsets and caches in device memory. Every other call takes CUDA tensors as it takes the CPU's:
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

/// Keys and values of many sequences in pages of device memory, as serving engines keep them. The caller owns
/// all of it: it writes the keys and values of new tokens, then `lengths`, and calls `update_means`. Lowering
/// a length drops tokens.
struct PagedCache {
  /// [pages, page_tokens, Hkv, D] of one dtype, any strides but of the last dimension.
  Tensor k{}, v{};
  /// [pages, blocks that a page can begin, Hkv, D], in the dtype of k: the mean key of a complete block, at
  /// the page where the block begins. Not read, and may be empty, if nothing is selected: top_k is 1 or
  /// covers every block.
  Tensor means{};
  /// [sequences, table_stride]: page i of a sequence holds its tokens from i x page_tokens on. Read by the
  /// device, hence not checked; entries after a sequence's last token are not read. If null, page i of
  /// sequence s is page s x table_stride + i.
  const std::int32_t* page_table = nullptr;
  std::int64_t table_stride = 0;
  /// [sequences], tokens that each holds, 0 included.
  const std::int32_t* lengths = nullptr;
  /// [sequences], the number of leading padding tokens, which no query sees; may be null: none. Blocks are
  /// counted from the first token after the padding, and their means lie as if there were none.
  const std::int32_t* starts = nullptr;
  std::int64_t sequences = 0;
  /// At least the longest length.
  std::int64_t max_seqlen_k = 0;
};

/// One new token for every sequence, as `decode` on a KvCache: `q` and `outputs.out` [sequences, Hq, D],
/// `outputs.lse` [Hq, sequences]. Each query is the last token of its sequence, whose key the cache already
/// holds. `outputs.selection` must be null. If blocks are selected, page_tokens divides the block size, is a
/// multiple of it, or is at least `max_seqlen_k`.
MOBA_EXPORT void decode(const Tensor& q, const PagedCache& cache, const Routing& routing,
                        const Outputs& outputs, const Execution& execution = {});

/// Computes the means of the blocks that tokens have completed since sequences held `before` [sequences] of
/// them (null: none), at most `max_added` each.
MOBA_EXPORT void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                              std::int64_t max_added, const Execution& execution = {});

}  // namespace moba
