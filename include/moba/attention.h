#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moba/error.h"
#include "moba/execution.h"
#include "moba/export.h"
#include "moba/tensor.h"

/// Mixture of Block Attention (arXiv 2502.13189, Section 2.2). Shapes: `Tq`, `Tk` packed tokens of all
/// sequences; `Hq`, `Hkv` query and key/value heads, `Hq % Hkv == 0`; `D` head dimension.
///
/// Every function throws Error on bad arguments, before it writes anything. Views of inputs and outputs may
/// have any strides, the last dimension contiguous; outputs must not overlap each other or the inputs.
namespace moba {

/// Offsets of the sequences in a packed batch: sequence `s` holds queries `[cu_seqlens_q[s], cu_seqlens_q[s +
/// 1])` and keys `[cu_seqlens_k[s], cu_seqlens_k[s + 1])`. Both lists start at 0, never decrease and are
/// equally long. Queries are aligned to the end of their keys, so a sequence with more keys than queries
/// continues a cached prefix. Length 0 is legal.
struct Sequences {
  std::vector<std::int32_t> cu_seqlens_q{}, cu_seqlens_k{};
};

/// One sequence of as many queries as keys.
MOBA_EXPORT Sequences one_sequence(std::int64_t tokens);
/// One sequence whose `queries` are the last of `keys` tokens.
MOBA_EXPORT Sequences one_sequence(std::int64_t queries, std::int64_t keys);

/// The blocks that a query attends to. The paper's symbols: B = block_size, K = top_k (Equations 2 to 6).
struct Routing {
  static constexpr std::int64_t kEverything = std::numeric_limits<std::int64_t>::max();

  /// Tokens in a block, at least 1. Blocks are counted from the start of each sequence.
  std::int64_t block_size = 512;
  /// Blocks a query attends to, its own included, at least 1. Dense attention if no sequence has more blocks.
  std::int64_t top_k = 3;
  /// The first blocks of a sequence, selected before any other and counted in top_k; at most top_k - 1 when
  /// causal.
  std::int64_t sink_blocks = 0;
  /// Causal: own block plus the best complete blocks before it. Otherwise: the best of all blocks.
  bool causal = true;
  /// Non-causal only: a query's own block is selected first and counted in top_k.
  bool own_block = false;
  /// Softmax scale; default D^-0.5. Gate scores are not scaled.
  std::optional<float> scale{};

  /// Dense attention.
  static Routing full(bool causal = true) { return {.top_k = kEverything, .causal = causal}; }
};

/// Destination of the softmax weights of a decoded query, summed over ranges of its keys.
struct KeyWeights {
  /// [Hq, ceil(keys / range)], f32; null: not computed.
  float* data = nullptr;
  /// Number of consecutive keys that share a weight, at least 1.
  std::int64_t range = 1;
  /// Number of keys that are counted: the first ones of the sequence.
  std::int64_t keys = 0;
};

/// Destinations of a forward pass. Only `out` is required; `lse` and `selection` may be null. A selection is
/// [Hq, Tq, selection_width()]: for every query head and token the blocks, numbered within the sequence,
/// ascending, its own included.
struct Outputs {
  /// [Tq, Hq, D], in the dtype of q.
  Tensor out{};
  /// [Hq, Tq], natural logarithm of the softmax denominator over the selected keys; -inf if there are none.
  float* lse = nullptr;
  /// Rows of blocks, padded with -1 to `selection_stride`.
  std::int32_t* selection = nullptr;
  /// Elements from one row of `selection` to the next, at least selection_width(); 0: selection_width().
  std::int64_t selection_stride = 0;
  /// Of `decode` on the host alone: the weights of each sequence's query, 0 for keys that it does not attend
  /// to. Empty: none.
  std::span<const KeyWeights> weights{};
};

/// Width of a row of a selection: min(top_k, blocks of the longest sequence).
MOBA_EXPORT std::int64_t selection_width(const Sequences& sequences, const Routing& routing);

/// Computes out = softmax(scale q k^T over the selected blocks) v. `q` [Tq, Hq, D], `k` and `v` [Tk, Hkv, D],
/// of one dtype. Results are bit-identical for any number of threads and any workspace.
MOBA_EXPORT void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// Computes the selection alone, as in `Outputs`; not null.
MOBA_EXPORT void select_blocks(const Tensor& q, const Tensor& k, const Sequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {}, std::int64_t selection_stride = 0);

/// Results of the forward pass that the backward pass reads.
struct Saved {
  /// [Tq, Hq, D], as `attention` wrote it.
  Tensor out{};
  /// [Hq, Tq], as `attention` wrote it; not null.
  const float* lse = nullptr;
  /// As `attention` wrote it, with the same stride; if null, the same blocks are selected again.
  const std::int32_t* selection = nullptr;
  std::int64_t selection_stride = 0;
};

/// Gradients in the shapes of q, k and v.
struct Gradients {
  Tensor dq{}, dk{}, dv{};
};

/// Overwrites (does not accumulate) dq, dk and dv, the gradients of `attention` for `d_out` [Tq, Hq, D]. The
/// selection is a constant: no gradient flows through the gate. An invalid `saved.selection` throws Error.
MOBA_EXPORT void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Saved& saved, const Sequences& sequences, const Routing& routing,
                                    const Gradients& gradients, const Execution& execution = {});

/// Names of this build's backends, as Execution::backend accepts them, the default first.
MOBA_EXPORT std::vector<std::string> backends();

/// The instruction set that the "cpu" backend runs on, by Highway's name ("AVX3", "AVX2", ...): the best of
/// this machine, or the one that MOBA_CPU_TARGET names. Empty if this machine lacks that one.
MOBA_EXPORT std::string cpu_target();

}  // namespace moba
