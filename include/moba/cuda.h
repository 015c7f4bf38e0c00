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

/// Keys and values of many sequences in pages of device memory, as serving engines keep them. All of it is
/// the caller's: it writes the keys and values of new tokens, then `lengths`, and calls `update_means`. To
/// forget tokens is to lower a length.
struct PagedCache {
  /// [pages, page_tokens, Hkv, D] of one dtype, any strides but of the last dimension.
  Tensor k{}, v{};
  /// [pages, blocks that a page can begin, Hkv, D], in the dtype of k: the mean key of a complete block, at
  /// the page where the block begins. Not read, and may be empty, where nothing is to be chosen: top_k is 1
  /// or covers every block.
  Tensor means{};
  /// [sequences, table_stride]: page i of a sequence holds its tokens from i x page_tokens on. Read by the
  /// device, so nothing checks it; entries behind a sequence's last token are not read. Null: page i of
  /// sequence s is page s x table_stride + i.
  const std::int32_t* page_table = nullptr;
  std::int64_t table_stride = 0;
  /// [sequences], tokens that each holds, 0 included.
  const std::int32_t* lengths = nullptr;
  /// [sequences], how many of them, the first ones, are padding that nobody sees; null: none. Blocks are
  /// counted from behind it, and their means lie as if there were none.
  const std::int32_t* starts = nullptr;
  std::int64_t sequences = 0;
  /// At least the longest length.
  std::int64_t longest = 0;
};

/// One new token for every sequence, as `decode` on a KvCache: `q` and `outputs.out` [sequences, Hq, D],
/// `outputs.lse` [Hq, sequences]. Each query is the last token of its sequence, whose key the cache already
/// holds. Where blocks are to be chosen, page_tokens divides their size, is a multiple of it, or is no less
/// than `longest`.
MOBA_EXPORT void decode(const Tensor& q, const PagedCache& cache, const Routing& routing,
                        const Outputs& outputs, const Execution& execution = {});

/// Computes the means of the blocks that tokens have completed since sequences held `before` [sequences] of
/// them (null: none), at most `most_added` each.
MOBA_EXPORT void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                              std::int64_t most_added, const Execution& execution = {});

}  // namespace moba
