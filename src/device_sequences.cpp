/// The doors of moba/cuda.h: what attention.cpp does, for sequences that the device alone can read.
#include <algorithm>

#include "backend.h"
#include "checks.h"

namespace moba {
namespace {

DeviceBatch batch_of(const DeviceSequences& sequences) {
  return {sequences.q, sequences.k, sequences.count, sequences.longest, true};
}

const DeviceFlow& flow_for(std::string_view function, const Tensor& q, const Execution& execution) {
  check_execution(function, execution);
  const Backend& backend = named_backend(execution.backend, q.device, function);
  if (backend.device == nullptr) {
    throw Error(std::string(function) + ": backend " + std::string(backend.name) +
                " takes sequences in the host's memory");
  }
  return *backend.device;
}

}  // namespace

std::int64_t selection_width(const DeviceSequences& sequences, const Routing& routing) {
  return std::min(routing.top_k,
                  sequences.longest == 0 ? 0 : (sequences.longest - 1) / routing.block_size + 1);
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  constexpr std::string_view function = "attention";
  check_attention(function, q, k, v, sequences, routing);
  check_outputs(function, q, outputs);
  check_apart_from_keys(function, outputs, k, v);
  flow_for(function, q, execution)
      .attention(function, q, k, v, batch_of(sequences), routing, outputs, execution);
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceSequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  constexpr std::string_view function = "attention_backward";
  check_attention(function, q, k, v, sequences, routing);
  check_backward(function, d_out, q, k, v, saved, gradients);
  flow_for(function, q, execution)
      .attention_backward(function, d_out, q, k, v, saved, batch_of(sequences), routing, gradients,
                          execution);
}

void select_blocks(const Tensor& q, const Tensor& k, const DeviceSequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution) {
  constexpr std::string_view function = "select_blocks";
  check_attention(function, q, k, k, sequences, routing);
  if (selection == nullptr)
    throw Error("select_blocks: selection is null; [Hq, Tq, selection_width()] int32 is needed");
  flow_for(function, q, execution)
      .attention(function, q, k, k, batch_of(sequences), routing, {.selection = selection}, execution);
}

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  constexpr std::string_view function = "decode";
  check_paged(function, q, cache, routing);
  check_decode(q, cache.sequences, outputs);
  check_outputs(function, q, outputs);
  flow_for(function, q, execution).decode(function, q, cache, routing, outputs, execution);
}

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t most_added, const Execution& execution) {
  constexpr std::string_view function = "update_means";
  if (block_size < 1 || most_added < 0) {
    throw Error(std::string(function) + ": block_size is " + std::to_string(block_size) + " and most_added " +
                std::to_string(most_added) + "; at least 1 and 0 are expected");
  }
  check_paged(function, cache, block_size);
  flow_for(function, cache.k, execution)
      .update_means(function, cache, block_size, before, most_added, execution);
}

}  // namespace moba
