// The public functions of moba/attention.h, moba/cache.h and moba/cuda.h: they check the arguments, choose
// the backend and call its flow.
#include "backend.h"
#include "cache_state.h"
#include "checks.h"
#include "errors.h"
#include "gate_inputs.h"
#include "host/flow.h"
#include "paged_cache.h"

namespace moba {
namespace {

/// Returns the operations of the device that q is on; null for a host backend.
const DeviceFlow* device_for(const Tensor& q, const Execution& execution) {
  check_execution(execution);
  return named_backend(execution.backend, q.device).device;
}

/// The same for arguments that only a device can read.
const DeviceFlow& device_required(const Tensor& q, const Execution& execution) {
  const DeviceFlow* device = device_for(q, execution);
  if (device == nullptr) {
    refuse("backend", "expected one that reads sequences in device memory, got ",
           named_backend(execution.backend, q.device).name);
  }
  return *device;
}

/// Throws ArgumentError unless q is in host memory, as a host backend needs it.
void require_host(const Tensor& q, const Execution& execution) {
  if (q.device != Device::cpu) {
    refuse("backend", "expected one that works on CUDA tensors, got ",
           named_backend(execution.backend, q.device).name);
  }
}

}  // namespace

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_attention(q, k, v, sequences, routing);
    check_outputs(q, outputs, routing, selection_width(sequences, routing));
    check_apart_from_keys(outputs, k, v);
    if (const DeviceFlow* device = device_for(q, execution))
      return device->attention(q, k, v, batch_of(sequences), routing, outputs, execution);
    host::forward(make_call(q, k, v, sequences, routing), nullptr, outputs, execution);
  });
}

void select_blocks(const Tensor& q, const Tensor& k, const Sequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution, std::int64_t selection_stride) {
  named("select_blocks", [&] {
    const Outputs outputs{.selection = selection, .selection_stride = selection_stride};
    check_attention(q, k, k, sequences, routing);
    check_selected(outputs, routing, selection_width(sequences, routing));
    if (const DeviceFlow* device = device_for(q, execution))
      return device->attention(q, k, k, batch_of(sequences), routing, outputs, execution);
    host::forward(make_call(q, k, k, sequences, routing), nullptr, outputs, execution);
  });
}

void select_blocks(const GateInputs& gate, const Sequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution, std::int64_t selection_stride) {
  named("select_blocks", [&] {
    const Outputs outputs{.selection = selection, .selection_stride = selection_stride};
    check_gate(gate, sequences, routing);
    check_selected(outputs, routing, selection_width(sequences, routing));
    if (const DeviceFlow* device = device_for(gate.q, execution)) {
      if (gate.k.sizes[0] != count_blocks(sequences.cu_seqlens_k, routing.block_size).all)
        refuse("gate.k",
               "expected a row for every block, the incomplete last ones included (backend cuda), got ",
               gate.k.sizes[0]);
      return device->select(gate, batch_of(sequences), routing, outputs, execution);
    }
    const Call call = make_gate_call(gate, sequences, routing);
    if (!call.needs_scores()) return host::forward(call, nullptr, outputs, execution);
    Scratch scratch(execution.scratch);
    const BlockMeans keys = gate_keys(call, gate.k, scratch);
    host::forward(call, &keys, outputs, execution);
  });
}

void block_features(const Tensor& k, const std::vector<std::int32_t>& cu_seqlens_k, std::int64_t block_size,
                    const BlockFeatures& features, const Execution& execution) {
  named("block_features", [&] {
    check_features(k, cu_seqlens_k, block_size, features);
    const Sequences sequences{cu_seqlens_k, cu_seqlens_k};
    if (const DeviceFlow* device = device_for(k, execution))
      return device->features(k, batch_of(sequences), block_size, features, execution);
    const Routing routing{.block_size = block_size, .top_k = 1, .causal = false};
    host::features(make_call(k, k, k, sequences, routing), features, execution);
  });
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const Sequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  named("attention_backward", [&] {
    check_attention(q, k, v, sequences, routing);
    check_backward(d_out, q, k, v, saved, routing, selection_width(sequences, routing), gradients);
    if (const DeviceFlow* device = device_for(q, execution)) {
      return device->attention_backward(d_out, q, k, v, saved, batch_of(sequences), routing, gradients,
                                        execution);
    }
    host::backward(make_call(q, k, v, sequences, routing), d_out, saved, gradients, execution);
  });
}

void attention(const Tensor& q, const KvCache& cache, std::int64_t sequence, const Routing& routing,
               const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_sequence(cache, sequence);
    check_cached(q, cache, routing);
    check_outputs(q, outputs, routing,
                  selection_width(one_sequence(q.sizes[0], cache.length(sequence)), routing));
    check_execution(execution);
    const BlockMeans means = cached_means(cache, sequence);
    host::forward(cached_call(q, cache, sequence, routing), &means, outputs, execution);
  });
}

void decode(const Tensor& q, const KvCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  named("decode", [&] {
    check_cached(q, cache, routing);
    check_decode(q, cache.shape().sequences, outputs);
    check_destinations(q, outputs, routing, 0);
    check_execution(execution);
    const Call call = decode_call(q, cache, routing);
    check_weights(outputs, call.sequences);
    host::decode(call, cached_means(cache), outputs, execution);
  });
}

void attention(const Tensor& q, const PageLayout& layout, const PagedSequence& sequence,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_cached(q, layout, {&sequence, 1}, routing);
    check_outputs(q, outputs, routing, selection_width(one_sequence(q.sizes[0], sequence.length), routing));
    check_execution(execution);
    const BlockMeans means = cached_means(layout, {&sequence, 1});
    host::forward(cached_call(q, layout, sequence, routing), &means, outputs, execution);
  });
}

void decode(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
            const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("decode", [&] {
    check_cached(q, layout, sequences, routing);
    check_decode(q, static_cast<std::int64_t>(sequences.size()), outputs);
    check_destinations(q, outputs, routing, 0);
    check_execution(execution);
    const Call call = decode_call(q, layout, sequences, routing);
    check_weights(outputs, call.sequences);
    host::decode(call, cached_means(layout, sequences), outputs, execution);
  });
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    check_attention(q, k, v, sequences, routing);
    check_outputs(q, outputs, routing, selection_width(sequences, routing));
    check_apart_from_keys(outputs, k, v);
    device_required(q, execution).attention(q, k, v, batch_of(sequences), routing, outputs, execution);
  });
}

void select_blocks(const Tensor& q, const Tensor& k, const DeviceSequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution, std::int64_t selection_stride) {
  named("select_blocks", [&] {
    const Outputs outputs{.selection = selection, .selection_stride = selection_stride};
    check_attention(q, k, k, sequences, routing);
    check_selected(outputs, routing, selection_width(sequences, routing));
    device_required(q, execution).attention(q, k, k, batch_of(sequences), routing, outputs, execution);
  });
}

void select_blocks(const GateInputs& gate, const DeviceSequences& sequences, const Routing& routing,
                   std::int32_t* selection, const Execution& execution, std::int64_t selection_stride) {
  named("select_blocks", [&] {
    const Outputs outputs{.selection = selection, .selection_stride = selection_stride};
    check_gate(gate, sequences, routing);
    check_selected(outputs, routing, selection_width(sequences, routing));
    device_required(gate.q, execution).select(gate, batch_of(sequences), routing, outputs, execution);
  });
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceSequences& sequences, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  named("attention_backward", [&] {
    check_attention(q, k, v, sequences, routing);
    check_backward(d_out, q, k, v, saved, routing, selection_width(sequences, routing), gradients);
    device_required(q, execution)
        .attention_backward(d_out, q, k, v, saved, batch_of(sequences), routing, gradients, execution);
  });
}

void attention(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  named("attention", [&] {
    if (device_for(q, execution) != nullptr)
      refuse("backend", "expected one that works on CPU tensors, got cuda");
    require_host(q, execution);
    check_paged(q, cu_seqlens_q, cache, routing);
    check_outputs(q, outputs, routing,
                  selection_width(DeviceSequences{.max_seqlen_k = cache.max_seqlen_k}, routing));
    const Call call = paged_call(q, cu_seqlens_q, cache, routing);
    Scratch scratch(execution.scratch);
    const BlockMeans means = paged_means(call, cache, scratch, execution);
    host::forward(call, &means, outputs, execution);
  });
}

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  named("decode", [&] {
    check_paged(q, cache, routing);
    check_decode(q, cache.sequences, outputs);
    check_outputs(q, outputs, routing, 0);
    if (const DeviceFlow* device = device_for(q, execution))
      return device->decode(q, cache, routing, outputs, execution);
    require_host(q, execution);
    const Call call = paged_call(q, nullptr, cache, routing);
    Scratch scratch(execution.scratch);
    host::decode(call, paged_means(call, cache, scratch, execution), outputs, execution);
  });
}

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t max_added, const Execution& execution) {
  named("update_means", [&] {
    if (block_size < 1) refuse("block_size", "expected at least 1, got ", block_size);
    if (max_added < 0) refuse("max_added", "expected at least 0, got ", max_added);
    check_paged(cache, block_size);
    if (const DeviceFlow* device = device_for(cache.k, execution))
      return device->update_means(cache, block_size, before, max_added, execution);
    require_host(cache.k, execution);
    check_update(cache, before, max_added);
    host::update_means(cache, block_size, before, execution);
  });
}

}  // namespace moba
