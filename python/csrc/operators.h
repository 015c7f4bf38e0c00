/// PyTorch operators, which turn tensors into views, call libmoba and return tensors. They use torch's stable
/// ABI alone, so one build serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "device_call.h"
#include "host_call.h"
#include "moba/cache.h"

namespace moba::pytorch {

/// Returns the elements of a contiguous lse [Hq, Tq]; throws Error for other sizes, dtypes or devices.
inline const float* lse_of(const std::string& function, const TorchTensor& lse, const Tensor& q,
                           const TorchDevice& device) {
  require_device(function, "lse", lse, device);
  if (lse.dim() != 2 || lse.size(0) != q.sizes[1] || lse.size(1) != q.sizes[0] ||
      lse.scalar_type() != ScalarType::Float || !lse.is_contiguous()) {
    throw Error(function + ": lse: expected contiguous [q heads, q tokens] of float32, got sizes " +
                sizes_text(lse));
  }
  return static_cast<const float*>(lse.data_ptr());
}

/// Returns a saved selection; null where the forward pass returned none, so that the blocks are selected
/// again. Throws Error for other sizes, dtypes or devices.
template <typename AnyCall>
const std::int32_t* saved_selection(const AnyCall& call, const Tensor& q, std::int64_t keys,
                                    const TorchTensor& given) {
  require_device(call.function, "selection", given, call.device);
  const std::int64_t width = call.width(keys);
  if (given.dim() != 3 || given.size(0) != q.sizes[1] || given.size(1) != q.sizes[0] ||
      (given.size(2) != width && given.size(2) != 0) || given.scalar_type() != ScalarType::Int ||
      !given.is_contiguous()) {
    throw Error(call.function + ": selection: expected contiguous [" + std::to_string(q.sizes[1]) + ", " +
                std::to_string(q.sizes[0]) + ", " + std::to_string(width) + " or 0] of int32, got sizes " +
                sizes_text(given));
  }
  return given.numel() == 0 ? nullptr : static_cast<const std::int32_t*>(given.data_ptr());
}

inline Routing routing_of(std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks, bool causal,
                          std::optional<double> scale) {
  Routing routing{.block_size = block_size, .top_k = top_k, .sink_blocks = sink_blocks, .causal = causal};
  if (scale) routing.scale = static_cast<float>(*scale);
  return routing;
}

template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor, TorchTensor> attention(
    const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const TorchTensor& cu_seqlens_q,
    const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks,
    bool causal, std::optional<double> scale, bool return_selection, std::string backend) {
  AnyCall call({"attention", routing_of(block_size, top_k, sink_blocks, causal, scale)}, q, k, cu_seqlens_q,
               cu_seqlens_k);
  const TorchDevice device = call.device;
  const Argument queries(call.function, "q", q, device), keys(call.function, "k", k, device),
      values(call.function, "v", v, device);
  TorchTensor out = empty_like(queries, device);
  TorchTensor lse = empty({q.size(1), q.size(0)}, ScalarType::Float, device);
  const std::int64_t width = return_selection ? call.width(k.size(0)) : 0;
  TorchTensor selection = empty({q.size(1), q.size(0), width}, ScalarType::Int, device);
  moba::attention(
      queries.view(), keys.view(), values.view(), call.sequences, call.routing,
      {.out = Argument(call.function, "out", out, device).view(),
       .lse = static_cast<float*>(lse.data_ptr()),
       .selection = selection.numel() > 0 ? static_cast<std::int32_t*>(selection.data_ptr()) : nullptr,
       .selection_stride = width},
      call.execution(backend, queries.view().dtype));
  return {out, lse, selection};
}

template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor, TorchTensor> attention_backward(
    const TorchTensor& d_out, const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
    const TorchTensor& out, const TorchTensor& lse, const TorchTensor& selection,
    const TorchTensor& cu_seqlens_q, const TorchTensor& cu_seqlens_k, std::int64_t block_size,
    std::int64_t top_k, std::int64_t sink_blocks, bool causal, std::optional<double> scale,
    std::string backend) {
  AnyCall call({"attention_backward", routing_of(block_size, top_k, sink_blocks, causal, scale)}, q, k,
               cu_seqlens_q, cu_seqlens_k);
  const TorchDevice device = call.device;
  const Argument gradient(call.function, "d_out", d_out, device), queries(call.function, "q", q, device),
      keys(call.function, "k", k, device), values(call.function, "v", v, device),
      forward(call.function, "out", out, device);
  TorchTensor dq = empty_like(queries, device), dk = empty_like(keys, device),
              dv = empty_like(values, device);
  moba::attention_backward(gradient.view(), queries.view(), keys.view(), values.view(),
                           {.out = forward.view(),
                            .lse = lse_of(call.function, lse, queries.view(), device),
                            .selection = saved_selection(call, queries.view(), k.size(0), selection),
                            .selection_stride = selection.size(2)},
                           call.sequences, call.routing,
                           {.dq = Argument(call.function, "dq", dq, device).view(),
                            .dk = Argument(call.function, "dk", dk, device).view(),
                            .dv = Argument(call.function, "dv", dv, device).view()},
                           call.execution(backend, queries.view().dtype));
  return {dq, dk, dv};
}

template <typename AnyCall>
TorchTensor select_blocks(const TorchTensor& q, const TorchTensor& k, const TorchTensor& cu_seqlens_q,
                          const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k,
                          std::int64_t sink_blocks, bool causal, std::string backend) {
  AnyCall call({"select_blocks", routing_of(block_size, top_k, sink_blocks, causal, {})}, q, k, cu_seqlens_q,
               cu_seqlens_k);
  const Argument queries(call.function, "q", q, call.device), keys(call.function, "k", k, call.device);
  TorchTensor selection = empty({q.size(1), q.size(0), call.width(k.size(0))}, ScalarType::Int, call.device);
  // An empty tensor has no memory of its own.
  const TorchTensor written = selection.numel() > 0 ? selection : empty({1}, ScalarType::Int, call.device);
  moba::select_blocks(queries.view(), keys.view(), call.sequences, call.routing,
                      static_cast<std::int32_t*>(written.data_ptr()),
                      call.execution(backend, queries.view().dtype), selection.size(2));
  return selection;
}

/// Returns a view of tokens [begin, end) of sequence `index` of a [sequences, tokens, heads, head_dim]
/// tensor.
inline moba::Tensor sequence_of(const TorchTensor& t, moba::DType dtype, std::int64_t index,
                                std::int64_t begin, std::int64_t end) {
  const auto offset = static_cast<std::size_t>(index * t.stride(0) + begin * t.stride(1));
  return {.data = static_cast<std::byte*>(t.data_ptr()) + offset * moba::size_of(dtype),
          .dtype = dtype,
          .rank = 3,
          .sizes = {end - begin, t.size(2), t.size(3)},
          .strides = {t.stride(1), t.stride(2), t.stride(3)}};
}

/// Throws Error unless `t` is [sequences, tokens or blocks, heads, head_dim] on that device.
inline void require_cached(const std::string& function, const char* name, const TorchTensor& t,
                           std::int64_t sequences, const TorchDevice& device) {
  require_device(function, name, t, device);
  if (t.dim() != 4 || t.size(0) != sequences) {
    throw Error(function + ": " + name + ": expected [" + std::to_string(sequences) +
                ", tokens or blocks, heads, head_dim], got sizes " + sizes_text(t));
  }
}

/// Throws Error unless `begin` and `end` have one entry for each sequence.
inline void require_spans(const std::string& function, std::int64_t begins, std::int64_t ends,
                          std::int64_t sequences) {
  if (begins == sequences && ends == sequences) return;
  throw Error(function + ": begin, end: expected " + std::to_string(sequences) +
              " entries (the sequences of q), got " + std::to_string(begins) + " and " +
              std::to_string(ends));
}

/// Decodes one token for each sequence from caches on the CPU.
inline std::tuple<TorchTensor, TorchTensor> decode(const TorchTensor& q, const TorchTensor& k,
                                                   const TorchTensor& v, const TorchTensor& means,
                                                   const TorchTensor& begin, const TorchTensor& end,
                                                   std::int64_t block_size, std::int64_t top_k,
                                                   std::int64_t sink_blocks, std::optional<double> scale,
                                                   const std::string& backend) {
  const std::string function = "decode";
  const Argument queries(function, "q", q, {});
  const std::int64_t sequences = q.size(0);
  require_cached(function, "k", k, sequences, {});
  require_cached(function, "v", v, sequences, {});
  require_cached(function, "means", means, sequences, {});
  const DType k_dtype = pytorch::dtype_of(function, "k", k), v_dtype = pytorch::dtype_of(function, "v", v),
              means_dtype = pytorch::dtype_of(function, "means", means);
  const std::vector<std::int32_t> from = offsets_of(function, "begin", begin),
                                  to = offsets_of(function, "end", end);
  require_spans(function, static_cast<std::int64_t>(from.size()), static_cast<std::int64_t>(to.size()),
                sequences);

  std::vector<moba::CachedSequence> cached;
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t first = from[static_cast<std::size_t>(s)], last = to[static_cast<std::size_t>(s)];
    if (first < 0 || last < first || last > k.size(1) || last > v.size(1)) {
      throw Error(function + ": begin, end: expected tokens of k (" + std::to_string(k.size(1)) +
                  ") and v (" + std::to_string(v.size(1)) + ") in sequence " + std::to_string(s) + ", got " +
                  std::to_string(first) + " and " + std::to_string(last));
    }
    cached.push_back({sequence_of(k, k_dtype, s, first, last), sequence_of(v, v_dtype, s, first, last),
                      sequence_of(means, means_dtype, s, 0, means.size(1))});
  }

  TorchTensor out = empty_like(queries, {}), lse = empty({q.size(1), sequences}, ScalarType::Float, {});
  HostCall call({function, routing_of(block_size, top_k, sink_blocks, true, scale)});
  moba::decode(queries.view(), cached, call.routing,
               {.out = Argument(function, "out", out, {}).view(), .lse = static_cast<float*>(lse.data_ptr())},
               call.execution(backend, queries.view().dtype));
  return {out, lse};
}

/// Decodes from caches on the device; the memory of each sequence is one page. `begin` and `end` are not
/// checked.
inline std::tuple<TorchTensor, TorchTensor> decode_on_device(
    const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const TorchTensor& means,
    const TorchTensor& begin, const TorchTensor& end, std::int64_t block_size, std::int64_t top_k,
    std::int64_t sink_blocks, std::optional<double> scale, const std::string& backend) {
  DeviceCall call({"decode", routing_of(block_size, top_k, sink_blocks, true, scale)}, q);
  const std::string& function = call.function;
  const TorchDevice device = call.device;
  const Argument queries(function, "q", q, device);
  const std::int64_t sequences = q.size(0);
  require_cached(function, "k", k, sequences, device);
  require_cached(function, "v", v, sequences, device);
  require_cached(function, "means", means, sequences, device);
  const Argument keys(function, "k", k, device, 4), values(function, "v", v, device, 4),
      averages(function, "means", means, device, 4);
  const std::int32_t *starts = call.list("begin", begin), *lengths = call.list("end", end);
  require_spans(function, begin.size(0), end.size(0), sequences);

  TorchTensor out = empty_like(queries, device),
              lse = empty({q.size(1), sequences}, ScalarType::Float, device);
  moba::decode(
      queries.view(),
      {.k = keys.view(),
       .v = values.view(),
       .means = averages.view(),
       .table_stride = 1,
       .lengths = lengths,
       .starts = starts,
       .sequences = sequences,
       .max_seqlen_k = k.size(1)},
      call.routing,
      {.out = Argument(function, "out", out, device).view(), .lse = static_cast<float*>(lse.data_ptr())},
      call.execution(backend, queries.view().dtype));
  return {out, lse};
}

inline void define_operators(torch::stable::detail::StableLibrary& library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, "
      "SymInt top_k, SymInt sink_blocks=0, bool causal=True, float? scale=None, bool return_selection=False, "
      "str backend=\"\") -> (Tensor out, Tensor lse, Tensor selection)");
  library.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
      "selection, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, SymInt top_k, SymInt sink_blocks=0, "
      "bool causal=True, float? scale=None, str backend=\"\") -> (Tensor dq, Tensor dk, Tensor dv)");
  library.def(
      "select(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, SymInt top_k, "
      "SymInt sink_blocks=0, bool causal=True, str backend=\"\") -> Tensor");
  library.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor means, Tensor begin, Tensor end, SymInt block_size, "
      "SymInt top_k, SymInt sink_blocks=0, float? scale=None, str backend=\"\") -> (Tensor out, Tensor lse)");
}

inline void implement_on_device(torch::stable::detail::StableLibrary& library) {
  library.impl("attention", TORCH_BOX(&attention<DeviceCall>));
  library.impl("attention_backward", TORCH_BOX(&attention_backward<DeviceCall>));
  library.impl("decode", TORCH_BOX(&decode_on_device));
  library.impl("select", TORCH_BOX(&select_blocks<DeviceCall>));
}

}  // namespace moba::pytorch
