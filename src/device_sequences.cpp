/// The doors of moba/cuda.h: what attention.cpp does, for sequences that the device alone can read.
#include <algorithm>

#include "backend.h"
#include "checks.h"

namespace moba {
namespace {

DeviceBatch batch_of(const DeviceSequences& sequences) {
  return {sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.count, sequences.max_seqlen_k, true};
}

const DeviceFlow& flow_for(const Tensor& q, const Execution& execution) {
  check_execution(execution);
  const Backend& backend = named_backend(execution.backend, q.device);
  if (backend.device == nullptr) {
    refuse("backend", "expected one that reads sequences in device memory, got ", backend.name);
  }
  return *backend.device;
}

}  // namespace

std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing) {
  return std::min(routing.top_k,
                  sequences.max_seqlen_k == 0 ? 0 : (sequences.max_seqlen_k - 1) / routing.block_size + 1);
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  constexpr std::string_view function = "attention";
  named(function, [&] {
    check_attention(q, k, v, sequences, routing);
    check_outputs(q, outputs);
    check_apart_from_keys(outputs, k, v);
    flow_for(q, execution).attention(function, q, k, v, batch_of(sequences), routing, outputs, execution);
  });
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceSequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  constexpr std::string_view function = "attention_backward";
  named(function, [&] {
    check_attention(q, k, v, sequences, routing);
    check_backward(d_out, q, k, v, saved, gradients);
    flow_for(q, execution)
        .attention_backward(function, d_out, q, k, v, saved, batch_of(sequences), routing, gradients,
                            execution);
  });
}

void select_blocks(const Tensor& q, const Tensor& k, const DeviceSequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution) {
  constexpr std::string_view function = "select_blocks";
  named(function, [&] {
    check_attention(q, k, k, sequences, routing);
    check_selected(selection);
    flow_for(q, execution)
        .attention(function, q, k, k, batch_of(sequences), routing, {.selection = selection}, execution);
  });
}

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  constexpr std::string_view function = "decode";
  named(function, [&] {
    check_paged(q, cache, routing);
    check_decode(q, cache.sequences, outputs);
    check_outputs(q, outputs);
    flow_for(q, execution).decode(function, q, cache, routing, outputs, execution);
  });
}

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t most_added, const Execution& execution) {
  constexpr std::string_view function = "update_means";
  named(function, [&] {
    if (block_size < 1) refuse("block_size", "expected at least 1, got ", block_size);
    if (most_added < 0) refuse("most_added", "expected at least 0, got ", most_added);
    check_paged(cache, block_size);
    flow_for(cache.k, execution).update_means(function, cache, block_size, before, most_added, execution);
  });
}

}  // namespace moba
