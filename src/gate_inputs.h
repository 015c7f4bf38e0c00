#pragma once

#include "call.h"

/// A gate whose inputs are the caller's.
namespace moba {

/// Blocks of all sequences, and of their complete ones.
struct BlockCount {
  std::int64_t all = 0, complete = 0;
};
BlockCount count_blocks(const std::vector<std::int32_t>& cu_seqlens_k, std::int64_t block_size);

/// Builds the call of a gate from checked inputs. It has no keys and no values.
Call make_gate_call(const GateInputs& gate, const Sequences& sequences, const Routing& routing);
/// The gate keys in place of the means: a view where they are f32, converted otherwise.
BlockMeans gate_keys(const Call& call, const Tensor& k, Scratch& scratch);

}  // namespace moba
