#include <algorithm>

#include "checks.h"
#include "cuda/decode.h"
#include "cuda/flow.h"
#include "cuda/parts.h"

namespace moba::cuda {
namespace {

/// One page, and that all of them lie on the device in pieces of 16 bytes.
Tensor device_page(std::string_view function, const char* name, const Tensor& t) {
  const Tensor page = page_of(t);
  Tensor pages = page;  // their first rows
  pages.sizes[0] = t.sizes[0];
  pages.strides[0] = t.strides[0];
  check_view(function, name, page);
  check_view(function, name, pages);
  return page;
}

void check_lists(std::string_view function, const PagedCache& cache) {
  check_list(function, "cache.page_table", cache.page_table);
  check_list(function, "cache.lengths", cache.lengths);
  check_list(function, "cache.starts", cache.starts);
}

}  // namespace

void decode(std::string_view function, const Tensor& q, const PagedCache& cache, const Routing& routing,
            const Outputs& outputs, const Execution& execution) {
  const Tensor k = device_page(function, "cache.k", cache.k), v = device_page(function, "cache.v", cache.v);
  const DeviceBatch batch{.count = cache.sequences, .max_seqlen_k = cache.max_seqlen_k};
  const Task task = make_task(function, q, k, v, batch, routing);
  check_shared(function, task.head_dim, decode_shared_bytes(task.head_dim));
  if (task.needs_scores()) device_page(function, "cache.means", cache.means);
  check_view(function, "out", outputs.out);
  check_lists(function, cache);
  check_list(function, "lse", outputs.lse);
  if (task.sequences == 0) return;

  const auto bytes = [&](const WorkSlice& part) {
    ArenaLayout layout;
    carve_decoding(layout, task, part);
    return layout.used();
  };
  const std::vector<WorkSlice> parts = parts_within(function, task, execution, bytes);
  Stream stream(function, execution);
  const Arena arena(stream, bytes(parts.front()));
  for (const WorkSlice& part : parts) {
    ArenaLayout layout(arena.data());
    const Decoding decoding = carve_decoding(layout, task, part);
    if (task.needs_scores()) {
      decode_score(stream, task, part, cache, decoding);
      decode_select(stream, task, part, cache, decoding);
    }
    decode_attend(stream, task, part, cache, decoding);
    decode_combine(stream, task, part, cache, decoding, outputs);
  }
  if (execution.profile != nullptr)
    execution.profile->workspace_bytes = std::max(execution.profile->workspace_bytes, bytes(parts.front()));
}

void update_means(std::string_view function, const PagedCache& cache, std::int64_t block_size,
                  const std::int32_t* before, std::int64_t max_added, const Execution& execution) {
  const Tensor k = device_page(function, "cache.k", cache.k);
  const DeviceBatch batch{.count = cache.sequences, .max_seqlen_k = cache.max_seqlen_k};
  const Task task = make_task(function, k, k, k, batch, {.block_size = block_size, .top_k = 1});
  device_page(function, "cache.means", cache.means);
  check_lists(function, cache);
  check_list(function, "before", before);
  if (cache.max_seqlen_k < block_size) return;
  Stream stream(function, execution);
  complete_means(stream, task, cache, before, max_added);
}

}  // namespace moba::cuda
