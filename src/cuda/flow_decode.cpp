#include "checks.h"
#include "cuda/decode.h"
#include "cuda/flow.h"

namespace moba::cuda {
namespace {

/// Returns the first page; checks that all lie on the device in rows of 16-byte vectors. Pages without rows
/// have no memory.
Tensor device_page(const char* name, const Tensor& t) {
  const Tensor page = page_of(t);
  check_view(name, page);
  if (page.sizes[0] == 0) return page;
  Tensor pages = page;  // their first rows
  pages.sizes[0] = t.sizes[0];
  pages.strides[0] = t.strides[0];
  check_view(name, pages);
  return page;
}

void check_lists(const PagedCache& cache) {
  check_list("cache.page_table", cache.page_table);
  check_list("cache.lengths", cache.lengths);
  check_list("cache.starts", cache.starts);
}

}  // namespace

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  const Tensor k = device_page("cache.k", cache.k), v = device_page("cache.v", cache.v);
  const DeviceBatch batch{.count = cache.sequences, .max_seqlen_k = cache.max_seqlen_k};
  const DeviceCall call = make_call(q, k, v, batch, routing);
  check_shared(call.head_dim, decode_shared_bytes(call.head_dim));
  if (call.needs_scores()) device_page("cache.means", cache.means);
  check_view("out", outputs.out);
  check_lists(cache);
  check_list("lse", outputs.lse);
  if (call.sequences == 0) return;

  const auto carve = [&](ArenaLayout& layout, const WorkSlice& slice) {
    return carve_decoding(layout, call, slice);
  };
  run_slices(call, execution, carve, [&](Stream& stream, const WorkSlice& slice, const Decoding& decoding) {
    if (call.needs_scores()) {
      decode_score(stream, call, slice, cache, decoding);
      decode_select(stream, call, slice, cache, decoding);
    } else if (call.is_routed()) {
      decode_take_selection(stream, call, slice, cache, decoding);
    }
    decode_attend(stream, call, slice, cache, decoding, outputs);
  });
}

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t max_added, const Execution& execution) {
  const Tensor k = device_page("cache.k", cache.k);
  const DeviceBatch batch{.count = cache.sequences, .max_seqlen_k = cache.max_seqlen_k};
  const DeviceCall call = make_call(k, k, k, batch, {.block_size = block_size, .top_k = 1});
  device_page("cache.means", cache.means);
  check_lists(cache);
  check_list("before", before);
  if (cache.max_seqlen_k < block_size) return;
  Stream stream(execution);
  complete_means(stream, call, cache, before, max_added);
}

}  // namespace moba::cuda
