/// PyTorch operators, which turn tensors into views, call libmoba and return tensors. They use torch's stable
/// ABI alone, so one build serves every torch from 2.10 on.
#pragma once

#include <string>
#include <string_view>
#include <tuple>

#include "device_call.h"
#include "host_call.h"
#include "implement.h"
#include "moba/cache.h"

namespace moba::pytorch {

/// Returns the elements of a contiguous lse [Hq, Tq]; throws ArgumentError for other sizes, dtypes or
/// devices.
inline const float* lse_of(const TorchTensor& lse, const Tensor& q, const TorchDevice& device) {
  require_device("lse", lse, device);
  if (lse.dim() != 2 || lse.size(0) != q.sizes[1] || lse.size(1) != q.sizes[0] ||
      lse.scalar_type() != ScalarType::Float || !lse.is_contiguous()) {
    refuse("lse", "expected contiguous [q heads, q tokens] of float32, got sizes ", sizes_text(lse));
  }
  return static_cast<const float*>(lse.data_ptr());
}

/// Returns a saved selection; null where the forward pass returned none, so that the blocks are selected
/// again. Throws ArgumentError for other sizes, dtypes or devices.
template <typename AnyCall>
const std::int32_t* saved_selection(const AnyCall& call, const Tensor& q, std::int64_t keys,
                                    const TorchTensor& given) {
  require_device("selection", given, call.device);
  const std::int64_t width = call.width(keys);
  if (given.dim() != 3 || given.size(0) != q.sizes[1] || given.size(1) != q.sizes[0] ||
      (given.size(2) != width && given.size(2) != 0) || given.scalar_type() != ScalarType::Int ||
      !given.is_contiguous()) {
    refuse("selection", "expected contiguous [", q.sizes[1], ", ", q.sizes[0], ", ", width,
           " or 0] of int32, got sizes ", sizes_text(given));
  }
  return given.numel() == 0 ? nullptr : static_cast<const std::int32_t*>(given.data_ptr());
}

/// Returns a view of a selection of the caller, [selection heads, q tokens, width] in rows of any stride;
/// throws ArgumentError for other shapes, dtypes, devices or strides.
inline Selection selection_of(const TorchTensor& given, const Tensor& q, const TorchDevice& device) {
  require_device("selection", given, device);
  if (given.dim() != 3 || given.size(1) != q.sizes[0] || given.scalar_type() != ScalarType::Int)
    refuse("selection", "expected [selection heads, ", q.sizes[0], ", width] of int32, got ",
           torch::headeronly::toString(given.scalar_type()), " ", sizes_text(given));
  const std::int64_t heads = given.size(0), tokens = given.size(1), width = given.size(2);
  if (heads < 1 || q.sizes[1] % heads != 0)
    refuse("selection", "expected a number of heads that divides ", q.sizes[1], " (the query heads), got ",
           heads);
  const std::int64_t stride = tokens > 1 ? given.stride(1) : heads > 1 ? given.stride(0) : width;
  const bool in_rows = stride >= width && (width <= 1 || given.stride(2) == 1) &&
                       (heads == 1 || given.stride(0) == tokens * stride);
  if (given.numel() > 0 && !in_rows)
    refuse("selection", "expected a contiguous tensor, or one cut from its last dimension, got strides [",
           given.stride(0), ", ", given.stride(1), ", ", given.stride(2), "]");
  return {.blocks = static_cast<const std::int32_t*>(given.data_ptr()),
          .heads = heads,
          .width = width,
          .stride = std::max(stride, width)};
}

inline Routing routing_of(std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks, bool causal,
                          std::optional<double> scale) {
  Routing routing{.block_size = block_size, .top_k = top_k, .sink_blocks = sink_blocks, .causal = causal};
  if (scale) routing.scale = static_cast<float>(*scale);
  return routing;
}

/// Returns an error of the library in terms of the operator, whose arguments are members of a struct there.
inline Error without_prefix(std::string message, std::string_view prefix) {
  for (std::size_t at; (at = message.find(prefix)) != std::string::npos;) message.erase(at, prefix.size());
  return Error(message);
}

template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor, TorchTensor> attention(
    const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const TorchTensor& cu_seqlens_q,
    const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks,
    bool causal, std::optional<double> scale, bool return_selection, std::string backend,
    std::optional<TorchTensor> given) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, causal, scale), q, k, cu_seqlens_q, cu_seqlens_k);
  const TorchDevice device = call.device;
  const Argument queries("q", q, device), keys("k", k, device), values("v", v, device);
  if (given) call.routing.selection = selection_of(*given, queries.view(), device);
  if (given && return_selection) refuse("return_selection", "expected false with a selection, got true");
  TorchTensor out = empty_like(queries, device);
  TorchTensor lse = empty({q.size(1), q.size(0)}, ScalarType::Float, device);
  const std::int64_t width = return_selection ? call.width(k.size(0)) : 0;
  TorchTensor selection = empty({q.size(1), q.size(0), width}, ScalarType::Int, device);
  moba::attention(
      queries.view(), keys.view(), values.view(), call.sequences, call.routing,
      {.out = Argument("out", out, device).view(),
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
  AnyCall call(routing_of(block_size, top_k, sink_blocks, causal, scale), q, k, cu_seqlens_q, cu_seqlens_k);
  const TorchDevice device = call.device;
  const Argument gradient("d_out", d_out, device), queries("q", q, device), keys("k", k, device),
      values("v", v, device), forward("out", out, device);
  const bool is_given = top_k == 0;
  if (is_given) call.routing.selection = selection_of(selection, queries.view(), device);
  TorchTensor dq = empty_like(queries, device), dk = empty_like(keys, device),
              dv = empty_like(values, device);
  moba::attention_backward(
      gradient.view(), queries.view(), keys.view(), values.view(),
      {.out = forward.view(),
       .lse = lse_of(lse, queries.view(), device),
       .selection = is_given ? nullptr : saved_selection(call, queries.view(), k.size(0), selection),
       .selection_stride = is_given ? 0 : selection.size(2)},
      call.sequences, call.routing,
      {.dq = Argument("dq", dq, device).view(),
       .dk = Argument("dk", dk, device).view(),
       .dv = Argument("dv", dv, device).view()},
      call.execution(backend, queries.view().dtype));
  return {dq, dk, dv};
}

template <typename AnyCall>
TorchTensor select_blocks(const TorchTensor& q, const TorchTensor& k, const TorchTensor& cu_seqlens_q,
                          const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k,
                          std::int64_t sink_blocks, bool causal, std::string backend) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, causal, {}), q, k, cu_seqlens_q, cu_seqlens_k);
  const Argument queries("q", q, call.device), keys("k", k, call.device);
  TorchTensor selection = empty({q.size(1), q.size(0), call.width(k.size(0))}, ScalarType::Int, call.device);
  // An empty tensor has no memory of its own.
  const TorchTensor written = selection.numel() > 0 ? selection : empty({1}, ScalarType::Int, call.device);
  moba::select_blocks(queries.view(), keys.view(), call.sequences, call.routing,
                      static_cast<std::int32_t*>(written.data_ptr()),
                      call.execution(backend, queries.view().dtype), selection.size(2));
  return selection;
}

/// Selects by the caller's gate inputs. A causal call's gate keys may lack the incomplete last blocks, so its
/// rows have room for one block more than there are keys.
template <typename AnyCall>
TorchTensor select_by_gate(const TorchTensor& q, const TorchTensor& k, const TorchTensor& cu_seqlens_q,
                           const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k,
                           std::int64_t sink_blocks, bool causal, bool own_block, std::string backend) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, causal, {}), q, k, cu_seqlens_q, cu_seqlens_k);
  call.routing.own_block = own_block;
  call.count_blocks(k.dim() > 0 ? k.size(0) : 0);
  const Argument queries("q", q, call.device), keys("k", k, call.device);
  const std::int64_t width = std::max<std::int64_t>(std::min(top_k, k.size(0) + (causal ? 1 : 0)), 0);
  TorchTensor selection = empty({q.size(1), q.size(0), width}, ScalarType::Int, call.device);
  // An empty tensor has no memory of its own.
  const TorchTensor written = selection.numel() > 0 ? selection : empty({1}, ScalarType::Int, call.device);
  try {
    moba::select_blocks(GateInputs{queries.view(), keys.view()}, call.sequences, call.routing,
                        static_cast<std::int32_t*>(written.data_ptr()),
                        call.execution(backend, queries.view().dtype), width);
  } catch (const Error& error) {
    throw without_prefix(error.what(), "gate.");
  }
  return selection;
}

/// Computes the features of the blocks of sequences of `tokens` keys each, [blocks, Hkv, D] in the dtype of
/// k.
template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor, TorchTensor> block_features(const TorchTensor& k, std::int64_t tokens,
                                                                 std::int64_t block_size,
                                                                 std::string backend) {
  AnyCall call({}, k);
  const Argument keys("k", k, call.device);
  if (tokens < 1 || k.size(0) % tokens != 0)
    refuse("tokens", "expected a divisor of ", k.size(0), " (the tokens of k), got ", tokens);
  if (block_size < 1) refuse("block_size", "expected at least 1, got ", block_size);
  const std::int64_t sequences = k.size(0) / tokens, blocks = (tokens - 1) / block_size + 1;
  std::vector<std::int32_t> starts;
  for (std::int64_t s = 0; s <= sequences; ++s) starts.push_back(static_cast<std::int32_t>(s * tokens));
  const auto feature = [&] {
    return empty({sequences * blocks, k.size(1), k.size(2)}, k.scalar_type(), call.device);
  };
  TorchTensor mean = feature(), max = feature(), min = feature();
  const auto view = [&](const TorchTensor& t) { return Argument("k", t, call.device).view(); };
  moba::block_features(keys.view(), starts, block_size,
                       {.mean = view(mean), .max = view(max), .min = view(min)},
                       call.execution(backend, keys.view().dtype));
  return {mean, max, min};
}

/// Throws ArgumentError unless `t` is [sequences, tokens or blocks, heads, head_dim] on that device.
inline void require_cached(const char* name, const TorchTensor& t, std::int64_t sequences,
                           const TorchDevice& device) {
  require_device(name, t, device);
  if (t.dim() != 4 || t.size(0) != sequences) {
    refuse(name, "expected [", sequences, ", tokens or blocks, heads, head_dim], got sizes ", sizes_text(t));
  }
}

/// Throws ArgumentError unless `begin` and `end` have one entry for each sequence.
inline void require_spans(std::int64_t begins, std::int64_t ends, std::int64_t sequences) {
  if (begins == sequences && ends == sequences) return;
  refuse("begin, end", "expected ", sequences, " entries (the sequences of q), got ", begins, " and ", ends);
}

/// Calls libmoba with a PagedCache, whose members are arguments of the operator: errors name those.
template <typename Body>
void call_with_cache(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    throw without_prefix(error.what(), "cache.");
  }
}

/// Decodes one token for each sequence from caches whose memory is one page of each sequence.
template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor> decode(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
                                            const TorchTensor& means, const TorchTensor& begin,
                                            const TorchTensor& end, std::int64_t block_size,
                                            std::int64_t top_k, std::int64_t sink_blocks,
                                            std::optional<double> scale, const std::string& backend,
                                            std::optional<TorchTensor> given) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, true, scale), q);
  const TorchDevice device = call.device;
  const Argument queries("q", q, device);
  if (given) call.routing.selection = selection_of(*given, queries.view(), device);
  const std::int64_t sequences = q.size(0);
  require_cached("k", k, sequences, device);
  require_cached("v", v, sequences, device);
  require_cached("means", means, sequences, device);
  const Argument keys("k", k, device, 4), values("v", v, device, 4), averages("means", means, device, 4);
  const std::int32_t *starts = call.list("begin", begin), *lengths = call.list("end", end);
  require_spans(begin.size(0), end.size(0), sequences);
  call.check_spans(starts, lengths, sequences, k.size(1));

  TorchTensor out = empty_like(queries, device),
              lse = empty({q.size(1), sequences}, ScalarType::Float, device);
  const PagedCache cache{.k = keys.view(),
                         .v = values.view(),
                         .means = averages.view(),
                         .table_stride = 1,
                         .lengths = lengths,
                         .starts = starts,
                         .sequences = sequences,
                         .max_seqlen_k = k.size(1)};
  call_with_cache([&] {
    moba::decode(queries.view(), cache, call.routing,
                 {.out = Argument("out", out, device).view(), .lse = static_cast<float*>(lse.data_ptr())},
                 call.execution(backend, queries.view().dtype));
  });
  return {out, lse};
}

/// A cache in pages: its tensors, page_table [sequences, pages of a sequence] and lengths [sequences].
template <typename AnyCall>
class PagedArguments {
 public:
  PagedArguments(AnyCall& call, const TorchTensor& k, const TorchTensor& v, const TorchTensor& means,
                 const TorchTensor& page_table, const TorchTensor& lengths)
      : k_("k", k, call.device, 4), v_("v", v, call.device, 4), means_("means", means, call.device, 4) {
    const std::int64_t sequences = lengths.dim() == 1 ? lengths.size(0) : -1;
    const std::int32_t* list = call.list("lengths", lengths);
    require_device("page_table", page_table, call.device);
    if (page_table.dim() != 2 || page_table.size(0) != sequences ||
        page_table.scalar_type() != ScalarType::Int) {
      refuse("page_table", "expected int32 [", sequences, " (the sequences of lengths), pages], got ",
             torch::headeronly::toString(page_table.scalar_type()), " ", sizes_text(page_table));
    }
    table_ = page_table.size(1) > 1 && page_table.stride(1) != 1 ? torch::stable::contiguous(page_table)
                                                                 : page_table;
    cache = {.k = k_.view(),
             .v = v_.view(),
             .means = means_.view(),
             .page_table = static_cast<const std::int32_t*>(table_.data_ptr()),
             .table_stride = table_.size(0) > 1 ? table_.stride(0) : table_.size(1),
             .lengths = list,
             .sequences = sequences};
    cache.max_seqlen_k = call.max_length(list, sequences, table_.size(1) * k.size(1));
  }

  PagedCache cache{};

 private:
  Argument k_, v_, means_;
  TorchTensor table_;
};

/// Attends with the last queries of every sequence to its pages.
template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor> paged_attention(
    const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const TorchTensor& means,
    const TorchTensor& page_table, const TorchTensor& lengths, const TorchTensor& cu_seqlens_q,
    std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks, std::optional<double> scale,
    const std::string& backend) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, true, scale), q);
  const Argument queries("q", q, call.device);
  const PagedArguments<AnyCall> pages(call, k, v, means, page_table, lengths);
  const std::int32_t* offsets = call.list("cu_seqlens_q", cu_seqlens_q);
  if (cu_seqlens_q.size(0) != pages.cache.sequences + 1) {
    refuse("cu_seqlens_q", "expected ", pages.cache.sequences + 1, " entries (one more than lengths), got ",
           cu_seqlens_q.size(0));
  }
  TorchTensor out = empty_like(queries, call.device),
              lse = empty({q.size(1), q.size(0)}, ScalarType::Float, call.device);
  call_with_cache([&] {
    moba::attention(
        queries.view(), offsets, pages.cache, call.routing,
        {.out = Argument("out", out, call.device).view(), .lse = static_cast<float*>(lse.data_ptr())},
        call.execution(backend, queries.view().dtype));
  });
  return {out, lse};
}

/// Decodes one token for each sequence from its pages.
template <typename AnyCall>
std::tuple<TorchTensor, TorchTensor> paged_decode(const TorchTensor& q, const TorchTensor& k,
                                                  const TorchTensor& v, const TorchTensor& means,
                                                  const TorchTensor& page_table, const TorchTensor& lengths,
                                                  std::int64_t block_size, std::int64_t top_k,
                                                  std::int64_t sink_blocks, std::optional<double> scale,
                                                  const std::string& backend) {
  AnyCall call(routing_of(block_size, top_k, sink_blocks, true, scale), q);
  const Argument queries("q", q, call.device);
  const PagedArguments<AnyCall> pages(call, k, v, means, page_table, lengths);
  TorchTensor out = empty_like(queries, call.device),
              lse = empty({q.size(1), q.size(0)}, ScalarType::Float, call.device);
  call_with_cache([&] {
    moba::decode(
        queries.view(), pages.cache, call.routing,
        {.out = Argument("out", out, call.device).view(), .lse = static_cast<float*>(lse.data_ptr())},
        call.execution(backend, queries.view().dtype));
  });
  return {out, lse};
}

/// Writes the means of the blocks that tokens have completed.
template <typename AnyCall>
void update_means(const TorchTensor& k, const TorchTensor& means, const TorchTensor& page_table,
                  const TorchTensor& lengths, const TorchTensor& before, std::int64_t block_size,
                  std::int64_t max_added, const std::string& backend) {
  AnyCall call(Routing{}, k);
  const PagedArguments<AnyCall> pages(call, k, k, means, page_table, lengths);
  const std::int32_t* former = call.list("before", before);
  if (pages.cache.means.data != means.data_ptr())
    refuse("means", "expected rows of contiguous elements, got other strides");
  if (before.size(0) != pages.cache.sequences) {
    refuse("before", "expected ", pages.cache.sequences, " entries (as lengths), got ", before.size(0));
  }
  call_with_cache([&] {
    moba::update_means(pages.cache, block_size, former, max_added,
                       call.execution(backend, pages.cache.k.dtype));
  });
}

inline void define_operators(torch::stable::detail::StableLibrary& library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, "
      "SymInt top_k, SymInt sink_blocks=0, bool causal=True, float? scale=None, bool return_selection=False, "
      "str backend=\"\", Tensor? selection=None) -> (Tensor out, Tensor lse, Tensor selected)");
  library.def(
      "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
      "selection, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, SymInt top_k, SymInt sink_blocks=0, "
      "bool causal=True, float? scale=None, str backend=\"\") -> (Tensor dq, Tensor dk, Tensor dv)");
  library.def(
      "select(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, SymInt top_k, "
      "SymInt sink_blocks=0, bool causal=True, str backend=\"\") -> Tensor");
  library.def(
      "select_by_gate(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt block_size, "
      "SymInt "
      "top_k, SymInt sink_blocks=0, bool causal=True, bool own_block=False, str backend=\"\") -> Tensor");
  library.def(
      "block_features(Tensor k, SymInt tokens, SymInt block_size, str backend=\"\") -> (Tensor mean, Tensor "
      "max, Tensor min)");
  library.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor means, Tensor begin, Tensor end, SymInt block_size, "
      "SymInt top_k, SymInt sink_blocks=0, float? scale=None, str backend=\"\", Tensor? selection=None) -> "
      "(Tensor out, Tensor lse)");
  library.def(
      "paged_attention(Tensor q, Tensor k, Tensor v, Tensor means, Tensor page_table, Tensor lengths, Tensor "
      "cu_seqlens_q, SymInt block_size, SymInt top_k, SymInt sink_blocks=0, float? scale=None, str "
      "backend=\"\") -> (Tensor out, Tensor lse)");
  library.def(
      "paged_decode(Tensor q, Tensor k, Tensor v, Tensor means, Tensor page_table, Tensor lengths, SymInt "
      "block_size, SymInt top_k, SymInt sink_blocks=0, float? scale=None, str backend=\"\") -> (Tensor out, "
      "Tensor lse)");
  library.def(
      "update_means(Tensor k, Tensor(a!) means, Tensor page_table, Tensor lengths, Tensor before, SymInt "
      "block_size, SymInt max_added, str backend=\"\") -> ()");
}

inline void implement_on_device(torch::stable::detail::StableLibrary& library) {
  implement<"attention", attention<DeviceCall>>(library);
  implement<"attention_backward", attention_backward<DeviceCall>>(library);
  implement<"decode", decode<DeviceCall>>(library);
  implement<"paged_decode", paged_decode<DeviceCall>>(library);
  implement<"select", select_blocks<DeviceCall>>(library);
  implement<"select_by_gate", select_by_gate<DeviceCall>>(library);
  implement<"block_features", block_features<DeviceCall>>(library);
  implement<"update_means", update_means<DeviceCall>>(library);
}

}  // namespace moba::pytorch
