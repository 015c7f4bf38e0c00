#pragma once

#include <cstdint>

#include "call.h"
#include "errors.h"
#include "moba/cache.h"
#include "moba/cuda.h"

/// Checks of arguments: every public function runs them, inside `named`, before it does or writes anything.
/// All throw ArgumentError.
namespace moba {

/// Checks q [Tq, Hq, D], k and v [Tk, Hkv, D], their views, the sequences and the routing.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                     const Routing& routing);
/// The same, except the offsets, which only the device can read.
void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
                     const Routing& routing);
/// `q`: the queries, whose heads a selection of the caller has to divide.
void check_routing(const Tensor& q, const Routing& routing);
/// Checks all destinations but the weights. `width`: that of the gate's selection.
void check_destinations(const Tensor& q, const Outputs& outputs, const Routing& routing, std::int64_t width);
/// The same of a call that computes no weights.
void check_outputs(const Tensor& q, const Outputs& outputs, const Routing& routing, std::int64_t width);
/// Checks, beyond check_outputs, that out shares no memory with the caller's keys and values.
void check_apart_from_keys(const Outputs& outputs, const Tensor& k, const Tensor& v);
/// Checks the inputs of a gate, whose keys are counted by the sequences.
void check_gate(const GateInputs& gate, const Sequences& sequences, const Routing& routing);
/// The same, except the offsets, which only the device can read.
void check_gate(const GateInputs& gate, const DeviceSequences& sequences, const Routing& routing);
void check_features(const Tensor& k, const std::vector<std::int32_t>& cu_seqlens_k, std::int64_t block_size,
                    const BlockFeatures& features);
/// Checks, beyond check_attention, that select_blocks has to select, and its destination.
void check_selected(const Outputs& outputs, const Routing& routing, std::int64_t width);
void check_execution(const Execution& execution);
void check_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Saved& saved, const Routing& routing, std::int64_t width,
                    const Gradients& gradients);
void check_cache_shape(const KvCache::Shape& shape);
void check_append(const KvCache& cache, const Tensor& k, const Tensor& v, std::int64_t sequence);
void check_page_layout(const PageLayout& layout);
void check_append(const Tensor& k, const Tensor& v, const PageLayout& layout, const PagedSequence& sequence);
/// Checks a query for sequences in the caller's pages.
void check_cached(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
                  const Routing& routing);
void check_truncate(const KvCache& cache, std::int64_t tokens, std::int64_t sequence);
void check_cached(const Tensor& q, const KvCache& cache, const Routing& routing);
/// Returns the first page of [pages, page_tokens, Hkv, D]; without tokens if there is none.
Tensor page_of(const Tensor& pages);
/// Checks a paged cache: its tensors, means included, and that page and block sizes fit.
void check_paged(const PagedCache& cache, std::int64_t block_size);
/// The same with a query; means only if it has to select.
void check_paged(const Tensor& q, const PagedCache& cache, const Routing& routing);
/// The same with the queries of every sequence.
void check_paged(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
                 const Routing& routing);
/// Checks, beyond check_paged, the former lengths of a cache on the host.
void check_update(const PagedCache& cache, const std::int32_t* before, std::int64_t max_added);
/// Checks, beyond check_cached, that there is one query for every sequence.
void check_decode(const Tensor& q, std::int64_t sequences, const Outputs& outputs);
/// Checks the destinations of weights against the sequences of a decode call.
void check_weights(const Outputs& outputs, std::span<const SequenceView> sequences);
void check_sequence(const KvCache& cache, std::int64_t sequence);

}  // namespace moba
