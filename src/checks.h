#pragma once

#include <cstdint>
#include <string_view>

#include "moba/cache.h"
#include "moba/cuda.h"

/// The door: every public function checks its arguments here before it does or writes anything. All throw
/// Error.
namespace moba {

/// q [Tq, Hq, D], k and v [Tk, Hkv, D], the sequences, the routing, and that each view is one the library can
/// walk.
void check_attention(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Sequences& sequences, const Routing& routing);
/// The same but for the sequences, whose starts only the device can read.
void check_attention(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
                     const DeviceSequences& sequences, const Routing& routing);
void check_routing(std::string_view function, const Routing& routing);
void check_outputs(std::string_view function, const Tensor& q, const Outputs& outputs);
/// On top of check_outputs: out shares no memory with keys and values that the caller owns.
void check_apart_from_keys(std::string_view function, const Outputs& outputs, const Tensor& k,
                           const Tensor& v);
void check_execution(std::string_view function, const Execution& execution);
void check_backward(std::string_view function, const Tensor& d_out, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Saved& saved, const Gradients& gradients);
void check_cache_shape(const KvCache::Shape& shape);
void check_append(const KvCache& cache, const Tensor& k, const Tensor& v, std::int64_t sequence);
void check_cached(std::string_view function, const Tensor& q, const KvCache& cache, const Routing& routing);
/// Of decode: sequences in the caller's memory.
void check_cached(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing);
/// The first of [pages, page_tokens, Hkv, D], without tokens where there is none.
Tensor page_of(const Tensor& pages);
/// Of the cache of moba/cuda.h: its tensors, its means among them, and that its pages go into blocks.
void check_paged(std::string_view function, const PagedCache& cache, std::int64_t block_size);
/// The same with a query; means only where it has to choose.
void check_paged(std::string_view function, const Tensor& q, const PagedCache& cache, const Routing& routing);
/// On top of check_cached: one query a sequence.
void check_decode(const Tensor& q, std::int64_t sequences, const Outputs& outputs);
void check_sequence(std::string_view function, const KvCache& cache, std::int64_t sequence);

}  // namespace moba
