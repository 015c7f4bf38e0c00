#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "moba/error.h"
#include "moba/execution.h"
#include "moba/export.h"
#include "moba/tensor.h"

/// Mixture of Block Attention (arXiv 2502.13189). Shapes below: `Tq`, `Tk` packed tokens; `Hq`, `Hkv` heads
/// with `Hq % Hkv == 0`; `D` head dimension.
namespace moba {

/// How a packed batch is cut into sequences: sequence `s` holds queries `[q[s], q[s + 1])` and keys `[k[s],
/// k[s + 1])`. Both lists start at 0, never decrease and are equally long. Queries are aligned to the end of
/// their keys, so a sequence with more keys than queries continues a cached prefix. Length 0 is legal.
struct Sequences {
  std::vector<std::int32_t> q{}, k{};
};

/// One sequence of as many queries as keys.
MOBA_EXPORT Sequences one_sequence(std::int64_t tokens);
/// One sequence whose `queries` are the last of `keys` tokens.
MOBA_EXPORT Sequences one_sequence(std::int64_t queries, std::int64_t keys);

/// What a query may see. The report's symbols: B = block_size, K = top_k (Section 2.2).
struct Routing {
  static constexpr std::int64_t kEverything = std::numeric_limits<std::int64_t>::max();

  /// Tokens in a block, at least 1. Blocks are counted from the start of each sequence.
  std::int64_t block_size = 512;
  /// Blocks a query attends to, its own included, at least 1. At least as many as there are: dense attention.
  std::int64_t top_k = 3;
  /// The first blocks of a sequence, selected before any other and counted in top_k; at most top_k - 1 when
  /// causal.
  std::int64_t sink_blocks = 0;
  /// Causal: own block plus the best complete blocks before it. Otherwise: the best of all blocks.
  bool causal = true;
  /// Non-causal only: a query's own block is selected first and counted in top_k.
  bool own_block = false;
  /// Of the logits; unset: D^-0.5. Scores for the gate are unscaled.
  std::optional<float> scale{};

  /// Dense attention.
  static Routing full(bool causal = true) { return {.top_k = kEverything, .causal = causal}; }
};

/// What a call writes. Only `out` is required.
struct Outputs {
  /// [Tq, Hq, D], in the dtype of q.
  Tensor out{};
  /// [Hq, Tq], natural logarithm of the softmax denominator over everything selected; -inf where nothing was.
  float* lse = nullptr;
  /// [Hq, Tq, selection_width()], block numbers within the sequence, ascending, padded with -1.
  std::int32_t* selection = nullptr;
};

/// Most blocks any query of this batch can select: min(top_k, blocks of the longest sequence).
MOBA_EXPORT std::int64_t selection_width(const Sequences& sequences, const Routing& routing);

/// out = softmax(scale q k^T over the selected blocks) v. `q` [Tq, Hq, D], `k` and `v` [Tk, Hkv, D], of one
/// dtype. Bit-identical on repetition and for any number of threads. Throws Error on bad arguments.
MOBA_EXPORT void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                           const Routing& routing, const Outputs& outputs, const Execution& execution = {});

/// The routing alone: writes `selection` [Hq, Tq, selection_width()] as `Outputs::selection` describes it.
MOBA_EXPORT void select_blocks(const Tensor& q, const Tensor& k, const Sequences& sequences,
                               const Routing& routing, std::int32_t* selection,
                               const Execution& execution = {});

/// What the backward pass reads besides q, k and v: the forward's results, and the gradient of `out`.
struct Saved {
  Tensor out{};
  /// [Hq, Tq].
  const float* lse = nullptr;
  /// As Outputs::selection; null: selected again from q and k, to the same blocks.
  const std::int32_t* selection = nullptr;
};

/// Gradients in the shapes of q, k and v.
struct Gradients {
  Tensor dq{}, dk{}, dv{};
};

/// Gradients of `attention` for `d_out` [Tq, Hq, D]. The selection counts as a constant: none flows through
/// the gate.
MOBA_EXPORT void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Saved& saved, const Sequences& sequences, const Routing& routing,
                                    const Gradients& gradients, const Execution& execution = {});

/// Names accepted by Execution::backend in this build, the default first.
MOBA_EXPORT std::vector<std::string> backends();

/// The instruction set that the "cpu" backend runs on, by Highway's name ("AVX3", "AVX2", ...): the best of
/// this machine, or what MOBA_CPU_TARGET asks for. Empty when that is not to be had.
MOBA_EXPORT std::string cpu_target();

}  // namespace moba
