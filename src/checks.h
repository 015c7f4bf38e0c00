#pragma once

#include <cstdint>

#include "errors.h"
#include "moba/cache.h"
#include "moba/cuda.h"

/// Checks of arguments: every public function runs them, inside `named`, before it does or writes anything.
/// All throw ArgumentError.
namespace moba {

/// q [Tq, Hq, D], k and v [Tk, Hkv, D], the sequences, the routing, and that each view is one the library can
/// walk.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                     const Routing& routing);
/// The same but for the sequences, whose starts only the device can read.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
                     const Routing& routing);
void check_routing(const Routing& routing);
void check_outputs(const Tensor& q, const Outputs& outputs);
/// On top of check_outputs: out shares no memory with keys and values that the caller owns.
void check_apart_from_keys(const Outputs& outputs, const Tensor& k, const Tensor& v);
/// On top of check_attention, of select_blocks.
void check_selected(const std::int32_t* selection);
void check_execution(const Execution& execution);
void check_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Saved& saved, const Gradients& gradients);
void check_cache_shape(const KvCache::Shape& shape);
void check_append(const KvCache& cache, const Tensor& k, const Tensor& v, std::int64_t sequence);
void check_truncate(const KvCache& cache, std::int64_t tokens, std::int64_t sequence);
void check_cached(const Tensor& q, const KvCache& cache, const Routing& routing);
/// Of decode: sequences in the caller's memory.
void check_cached(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing);
/// The first of [pages, page_tokens, Hkv, D], without tokens where there is none.
Tensor page_of(const Tensor& pages);
/// Of the cache of moba/cuda.h: its tensors, its means among them, and that its pages go into blocks.
void check_paged(const PagedCache& cache, std::int64_t block_size);
/// The same with a query; means only where it has to choose.
void check_paged(const Tensor& q, const PagedCache& cache, const Routing& routing);
/// On top of check_cached: one query a sequence.
void check_decode(const Tensor& q, std::int64_t sequences, const Outputs& outputs);
void check_sequence(const KvCache& cache, std::int64_t sequence);

}  // namespace moba
