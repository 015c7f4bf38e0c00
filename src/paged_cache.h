#pragma once

#include "call.h"
#include "moba/cache.h"

/// A paged cache in host memory, as the stages of a host backend read it: through pointers to its pages.
namespace moba {

/// Builds the call of queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]) of every sequence; null: one of each.
Call paged_call(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
                const Routing& routing);
/// Returns the means of the call's candidate blocks: views if a sequence has a single page, else copies of
/// them in `scratch`, which the gate reads in one stream. None if no query has to select.
BlockMeans paged_means(const Call& call, const PagedCache& cache, Scratch& scratch,
                       const Execution& execution);

namespace host {

/// `update_means` with checked arguments.
void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  const Execution& execution);

}  // namespace host
}  // namespace moba
