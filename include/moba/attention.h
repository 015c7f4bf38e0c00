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

/// Blocks that the caller selects in place of the gate, [heads, Tq, stride]: in every row the blocks of a
/// query, numbered within its sequence, ascending, padded with -1 to `width`. Causal: the query's own block
/// is the last of them. Not causal: any blocks of the sequence, or none. Other rows throw Error; those in
/// device memory are not checked, and entries that are no blocks of their query are ignored.
struct Selection {
  /// May be null if there are no rows or `width` is 0.
  const std::int32_t* blocks = nullptr;
  /// Divides Hq: query head h attends to the blocks of row h / (Hq / heads). 0: the gate selects.
  std::int64_t heads = 0;
  std::int64_t width = 0;
  /// Elements from one row to the next, at least `width`; 0: `width`.
  std::int64_t stride = 0;
};

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
  /// The caller's choice of blocks. If it has heads, no gate runs, and of the fields above block_size, causal
  /// and scale are read.
  Selection selection{};

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
  /// Rows of blocks, padded with -1 to `selection_stride`. Null if the caller selects (Routing::selection).
  std::int32_t* selection = nullptr;
  /// Elements from one row of `selection` to the next, at least selection_width(); 0: selection_width().
  std::int64_t selection_stride = 0;
  /// Of `decode` on the host alone: the weights of each sequence's query, 0 for keys that it does not attend
  /// to. Empty: none.
  std::span<const KeyWeights> weights{};
};

/// Width of a row of a selection: min(top_k or the width of the caller's, blocks of the longest sequence).
MOBA_EXPORT std::int64_t selection_width(const Sequences& sequences, const Routing& routing);

/// Computes out = softmax(scale q k^T over the selected blocks) v. `q` [Tq, Hq, D], `k` and `v` [Tk, Hkv, D],
/// of one dtype. Results are bit-identical for any number of threads and any workspace.
MOBA_EXPORT void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// Computes the selection alone, as in `Outputs`; not null.
MOBA_EXPORT void select_blocks(const Tensor& q, const Tensor& k, const Sequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {}, std::int64_t selection_stride = 0);

/// Inputs of a gate other than MoBA's, whose scores are <q, k>, unscaled.
struct GateInputs {
  /// [Tq, Hg, Dg].
  Tensor q{};
  /// [blocks, Hk, Dg], Hg % Hk == 0, in the dtype of q or in f32: one key for every block of every sequence,
  /// in their order. Causal: the incomplete blocks at the ends of all sequences may be missing, and are not
  /// read.
  Tensor k{};
};

/// Computes a selection [Hg, Tq, selection_width()] from gate inputs, by the rules of `Routing`. With the
/// queries and the means of the keys' blocks it is MoBA's, bit for bit. Of `sequences`, the keys are counted
/// alone.
MOBA_EXPORT void select_blocks(const GateInputs& gate, const Sequences& sequences, const Routing& routing,
                               std::int32_t* selection, const Execution& execution = {},
                               std::int64_t selection_stride = 0);

/// Features of blocks of keys, [blocks, Hkv, D] each, in f32 or the dtype of the keys: of every channel the
/// mean, the largest and the smallest value. NaN if a key has NaN there.
struct BlockFeatures {
  /// f32 sums, rounded to the dtype of the keys.
  Tensor mean{};
  Tensor max{}, min{};
};

/// Writes those features that have data, in one pass over `k` [Tk, Hkv, D]: a row for every block of every
/// sequence, in their order, an incomplete last one included. `cu_seqlens_k`: as in `Sequences`.
MOBA_EXPORT void block_features(const Tensor& k, const std::vector<std::int32_t>& cu_seqlens_k,
                                std::int64_t block_size, const BlockFeatures& features,
                                const Execution& execution = {});

/// Results of the forward pass that the backward pass reads. If the caller selects, `out` and `lse` may also
/// be those of one softmax over the keys of several calls, merged from their results: the gradients of all
/// calls then add up to that softmax's.
struct Saved {
  /// [Tq, Hq, D], as `attention` wrote it.
  Tensor out{};
  /// [Hq, Tq], as `attention` wrote it; not null.
  const float* lse = nullptr;
  /// As `attention` wrote it, with the same stride; if null, the same blocks are selected again. Null if the
  /// caller selects.
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
