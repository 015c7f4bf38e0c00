#include "checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "gate_inputs.h"

namespace moba {
namespace {

std::string sizes_of(const Tensor& t) {
  std::string text = "[";
  for (int dim = 0; dim < t.rank; ++dim) {
    if (dim > 0) text += ", ";
    text += std::to_string(t.sizes[static_cast<std::size_t>(dim)]);
  }
  return text + "]";
}

bool is_empty(const Tensor& t) {
  return t.sizes[0] == 0 || t.sizes[1] == 0 || t.sizes[2] == 0;
}

/// Bytes [begin, end) that a view reaches, counted from its data pointer.
struct Span {
  std::int64_t begin = 0, end = 0;
};

/// Returns false if a byte offset of the view, or the number of its bytes, does not fit 64 bits.
bool span_of(const Tensor& t, Span& span) {
  const auto bytes = static_cast<std::int64_t>(size_of(t.dtype));
  std::int64_t volume = bytes, low = 0, high = 0;
  bool overflow = false;
  for (std::size_t dim = 0; dim < 3; ++dim) {
    std::int64_t reach = 0;
    overflow |= __builtin_mul_overflow(volume, t.sizes[dim], &volume);
    overflow |= __builtin_mul_overflow(std::max<std::int64_t>(t.sizes[dim] - 1, 0), t.strides[dim], &reach);
    overflow |= __builtin_mul_overflow(reach, bytes, &reach);
    std::int64_t& side = reach < 0 ? low : high;
    overflow |= __builtin_add_overflow(side, reach, &side);
  }
  overflow |= __builtin_add_overflow(high, bytes, &high);
  span = {low, high};
  return !overflow;
}

/// Returns whether the two are different columns of one matrix with a token in each row, as q, k and v are
/// that come out of one product. Both have spans.
bool are_apart_in_rows(const Tensor& a, const Tensor& b) {
  const std::int64_t row = a.strides[0];
  if (a.dtype != b.dtype || row <= 0 || b.strides[0] != row) return false;
  const auto width_of = [](const Tensor& t) {
    return t.strides[1] < 0 ? std::numeric_limits<std::int64_t>::max()
                            : (t.sizes[1] - 1) * t.strides[1] + t.sizes[2];
  };
  const auto size = static_cast<std::int64_t>(size_of(a.dtype)), bytes = row * size;
  const std::int64_t distance = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(b.data) -
                                                          reinterpret_cast<std::uintptr_t>(a.data));
  const std::int64_t column = (distance % bytes + bytes) % bytes;
  return width_of(a) <= row && width_of(b) <= row && column >= width_of(a) * size &&
         column <= bytes - width_of(b) * size;
}

bool share_memory(const Tensor& a, const Tensor& b) {
  if (is_empty(a) || is_empty(b)) return false;
  Span in_a, in_b;
  if (!span_of(a, in_a) || !span_of(b, in_b)) return true;
  if (are_apart_in_rows(a, b)) return false;
  const auto at_a = reinterpret_cast<std::uintptr_t>(a.data), at_b = reinterpret_cast<std::uintptr_t>(b.data);
  return at_a + static_cast<std::uintptr_t>(in_a.begin) < at_b + static_cast<std::uintptr_t>(in_b.end) &&
         at_b + static_cast<std::uintptr_t>(in_b.begin) < at_a + static_cast<std::uintptr_t>(in_a.end);
}

/// Returns whether two elements may coincide: some stride is within the reach of the finer dimensions.
bool overlaps_itself(const Tensor& t) {
  std::array<std::pair<std::int64_t, std::int64_t>, 3> dims;  // |stride|, size
  for (std::size_t dim = 0; dim < 3; ++dim) dims[dim] = {std::abs(t.strides[dim]), t.sizes[dim]};
  std::sort(dims.begin(), dims.end());
  std::int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride <= reach) return true;
    reach += (size - 1) * stride;
  }
  return false;
}

/// Checks rank, sizes, dtype, strides and pointer of a view [tokens, heads, head_dim].
void check_view(const char* name, const Tensor& t) {
  if (t.rank != 3) refuse(name, "expected rank 3, [tokens, heads, head_dim], got rank ", t.rank);
  for (std::size_t dim = 0; dim < 3; ++dim) {
    if (t.sizes[dim] < 0) refuse(name, "expected sizes of at least 0, got ", sizes_of(t));
  }
  if (t.sizes[1] < 1 || t.sizes[2] < 1)
    refuse(name, "expected at least one head and a head_dim of at least 1, got sizes ", sizes_of(t));
  if (size_of(t.dtype) == 0 || t.dtype == DType::i8)
    refuse(name, "expected f32, bf16, f16 or f64, got ", name_of(t.dtype));
  if (t.sizes[2] > 1 && t.strides[2] != 1)
    refuse(name, "expected stride 1 in the last dimension, got ", t.strides[2]);
  Span span;
  if (!span_of(t, span))
    refuse(name, "expected sizes and strides within 64 bits, got sizes ", sizes_of(t), " and strides beyond");
  if (is_empty(t)) return;
  if (t.data == nullptr) refuse(name, "expected ", sizes_of(t), " elements, got null");
  if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(t.dtype) != 0)
    refuse(name, "expected alignment to ", name_of(t.dtype), ", got an unaligned pointer");
}

void check_same_kind(const char* name, const Tensor& t, const char* model_name, const Tensor& model) {
  if (t.dtype != model.dtype)
    refuse(name, "expected the dtype of ", model_name, ", ", name_of(model.dtype), ", got ",
           name_of(t.dtype));
  if (t.device != model.device) refuse(name, "expected the device of ", model_name, ", got another one");
}

void check_same_shape(const char* name, const Tensor& t, const char* model_name, const Tensor& model) {
  check_same_kind(name, t, model_name, model);
  if (!std::equal(t.sizes.begin(), t.sizes.begin() + 3, model.sizes.begin()))
    refuse(name, "expected the sizes of ", model_name, ", ", sizes_of(model), ", got ", sizes_of(t));
}

/// Checks that the elements of an output are distinct.
void check_written(const char* name, const Tensor& t) {
  if (!is_empty(t) && overlaps_itself(t))
    refuse(name, "expected distinct elements, got strides that lead to the same element twice");
}

void check_apart(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  if (share_memory(t, other)) refuse(name, "expected memory of its own, got memory shared with ", other_name);
}

void check_heads(std::int64_t q_heads, const char* name, std::int64_t kv_heads) {
  if (q_heads % kv_heads != 0)
    refuse(name, "expected a number of heads that divides ", q_heads, " (the query heads), got ", kv_heads);
}

/// Checks offsets that start at 0 and never decrease.
void check_offsets(const char* name, const std::vector<std::int32_t>& offsets) {
  if (offsets.empty()) refuse(name, "expected at least one entry (0), got an empty list");
  if (offsets.front() != 0) refuse(name, "expected to start at 0, got ", offsets.front());
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1])
      refuse(name, "expected never to decrease, got ", offsets[i], " after ", offsets[i - 1], " at entry ",
             i);
  }
}

/// The same, to the tokens of a tensor.
void check_offsets(const char* name, const std::vector<std::int32_t>& offsets, std::int64_t tokens,
                   const char* tensor) {
  check_offsets(name, offsets);
  if (offsets.back() != tokens)
    refuse(name, "expected to end at ", tokens, " (the tokens of ", tensor, "), got ", offsets.back());
}

/// Checks both offsets, those of the queries to their end.
void check_offsets(const Sequences& sequences, std::int64_t queries) {
  if (sequences.cu_seqlens_q.empty())
    refuse("cu_seqlens_q", "expected at least one entry (0), got an empty list");
  if (sequences.cu_seqlens_q.size() != sequences.cu_seqlens_k.size())
    refuse("cu_seqlens_k", "expected ", sequences.cu_seqlens_q.size(), " entries (as cu_seqlens_q), got ",
           sequences.cu_seqlens_k.size());
  check_offsets("cu_seqlens_q", sequences.cu_seqlens_q, queries, "q");
}

void check_lse(const float* lse) {
  if (reinterpret_cast<std::uintptr_t>(lse) % alignof(float) != 0)
    refuse("lse", "expected alignment to f32, got an unaligned pointer");
}

/// Checks where a selection is written, or where that of the forward pass is read.
void check_selection(const char* name, const std::int32_t* selection, std::int64_t stride,
                     const Routing& routing, std::int64_t width) {
  if (selection != nullptr && routing.selection.heads != 0)
    refuse(name, "expected null (the caller selects), got a pointer");
  if (reinterpret_cast<std::uintptr_t>(selection) % alignof(std::int32_t) != 0)
    refuse(name, "expected alignment to int32, got an unaligned pointer");
  if (stride != 0 && stride < width && routing.selection.heads == 0)
    refuse("selection_stride", "expected 0 or at least ", width, " (the width of the selection), got ",
           stride);
}

/// Checks new keys, values or queries for a cache: 16 or 32 bits wide, on the CPU.
void check_new(const char* name, const Tensor& t, const KvCache::Shape& shape) {
  check_view(name, t);
  if (t.dtype == DType::f64) refuse(name, "expected f32, bf16 or f16, got f64");
  if (t.device != Device::cpu) refuse(name, "expected CPU memory, got device memory");
  if (t.sizes[2] != shape.head_dim)
    refuse(name, "expected head_dim ", shape.head_dim, " (the cache's), got ", t.sizes[2]);
}

void check_sequences(const DeviceSequences& sequences) {
  if (sequences.count < 0) refuse("sequences.count", "expected at least 0, got ", sequences.count);
  if (sequences.count > 0 && (sequences.cu_seqlens_q == nullptr || sequences.cu_seqlens_k == nullptr))
    refuse(sequences.cu_seqlens_q == nullptr ? "cu_seqlens_q" : "cu_seqlens_k", "expected [", sequences.count,
           " + 1] int32 on the device, got null");
  if (sequences.max_seqlen_k < 0 || sequences.max_seqlen_k > std::numeric_limits<std::int32_t>::max())
    refuse("sequences.max_seqlen_k", "expected 0 to ", std::numeric_limits<std::int32_t>::max(), ", got ",
           sequences.max_seqlen_k);
}

void check_tensors(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_view("q", q);
  check_view("k", k);
  check_view("v", v);
  check_same_kind("k", k, "q", q);
  check_heads(q.sizes[1], "k", k.sizes[1]);
  if (k.sizes[2] != q.sizes[2])
    refuse("k", "expected head_dim ", q.sizes[2], " (that of q), got ", k.sizes[2]);
  check_same_shape("v", v, "k", k);
}

}  // namespace

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceSequences& sequences,
                     const Routing& routing) {
  check_tensors(q, k, v);
  check_sequences(sequences);
  check_routing(q, routing);
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& sequences,
                     const Routing& routing) {
  check_tensors(q, k, v);
  check_offsets(sequences, q.sizes[0]);
  check_offsets("cu_seqlens_k", sequences.cu_seqlens_k, k.sizes[0], "k");
  check_routing(q, routing);
}

namespace {

void check_selection(const Tensor& q, const Selection& selection) {
  if (selection.heads < 0 || q.sizes[1] % selection.heads != 0)
    refuse("selection.heads", "expected a divisor of ", q.sizes[1], " (the query heads), got ",
           selection.heads);
  if (selection.width < 0 || selection.width > std::numeric_limits<std::int32_t>::max())
    refuse("selection.width", "expected 0 to ", std::numeric_limits<std::int32_t>::max(), ", got ",
           selection.width);
  if (selection.stride != 0 && selection.stride < selection.width)
    refuse("selection.stride", "expected 0 or at least ", selection.width, " (the width), got ",
           selection.stride);
  if (selection.blocks == nullptr && selection.width > 0 && q.sizes[0] > 0)
    refuse("selection.blocks", "expected [", selection.heads, ", ", q.sizes[0], ", ", selection.width,
           "] int32, got null");
  if (reinterpret_cast<std::uintptr_t>(selection.blocks) % alignof(std::int32_t) != 0)
    refuse("selection.blocks", "expected alignment to int32, got an unaligned pointer");
}

}  // namespace

void check_routing(const Tensor& q, const Routing& routing) {
  if (routing.block_size < 1) refuse("block_size", "expected at least 1, got ", routing.block_size);
  if (routing.scale && !std::isfinite(*routing.scale))
    refuse("scale", "expected a finite number, got ", *routing.scale);
  if (routing.selection.heads != 0) return check_selection(q, routing.selection);
  if (routing.top_k < 1) refuse("top_k", "expected at least 1, got ", routing.top_k);
  if (routing.own_block && routing.causal)
    refuse("own_block", "expected false for causal routing (it always includes the own block), got true");
  const std::int64_t max_sinks = routing.top_k - (routing.causal || routing.own_block ? 1 : 0);
  if (routing.sink_blocks < 0 || routing.sink_blocks > max_sinks)
    refuse("sink_blocks", "expected 0 to ", max_sinks, " for top_k ", routing.top_k, ", got ",
           routing.sink_blocks);
}

void check_destinations(const Tensor& q, const Outputs& outputs, const Routing& routing, std::int64_t width) {
  check_view("out", outputs.out);
  check_same_shape("out", outputs.out, "q", q);
  check_written("out", outputs.out);
  check_apart("out", outputs.out, "q", q);
  check_lse(outputs.lse);
  check_selection("selection", outputs.selection, outputs.selection_stride, routing, width);
}

void check_outputs(const Tensor& q, const Outputs& outputs, const Routing& routing, std::int64_t width) {
  check_destinations(q, outputs, routing, width);
  if (!outputs.weights.empty())
    refuse("weights", "expected none (decode on the host computes them), got ", outputs.weights.size());
}

void check_apart_from_keys(const Outputs& outputs, const Tensor& k, const Tensor& v) {
  check_apart("out", outputs.out, "k", k);
  check_apart("out", outputs.out, "v", v);
}

namespace {

void check_gate(const GateInputs& gate) {
  const auto& [q, k] = gate;
  check_view("gate.q", q);
  check_view("gate.k", k);
  if (k.dtype != q.dtype && k.dtype != DType::f32)
    refuse("gate.k", "expected f32 or the dtype of gate.q, ", name_of(q.dtype), ", got ", name_of(k.dtype));
  if (k.device != q.device) refuse("gate.k", "expected the device of gate.q, got another one");
  check_heads(q.sizes[1], "gate.k", k.sizes[1]);
  if (k.sizes[2] != q.sizes[2])
    refuse("gate.k", "expected head_dim ", q.sizes[2], " (that of gate.q), got ", k.sizes[2]);
}

}  // namespace

void check_gate(const GateInputs& gate, const DeviceSequences& sequences, const Routing& routing) {
  check_gate(gate);
  check_sequences(sequences);
  check_routing(gate.q, routing);
}

void check_gate(const GateInputs& gate, const Sequences& sequences, const Routing& routing) {
  check_gate(gate);
  const auto& [q, k] = gate;
  check_offsets(sequences, q.sizes[0]);
  check_offsets("cu_seqlens_k", sequences.cu_seqlens_k);
  check_routing(q, routing);
  const BlockCount blocks = count_blocks(sequences.cu_seqlens_k, routing.block_size);
  if (k.sizes[0] != blocks.all && !(routing.causal && k.sizes[0] == blocks.complete))
    refuse("gate.k", "expected ", blocks.all, " rows (a block of the sequences each), got ", k.sizes[0]);
}

void check_features(const Tensor& k, const std::vector<std::int32_t>& cu_seqlens_k, std::int64_t block_size,
                    const BlockFeatures& features) {
  check_view("k", k);
  check_offsets("cu_seqlens_k", cu_seqlens_k, k.sizes[0], "k");
  if (block_size < 1) refuse("block_size", "expected at least 1, got ", block_size);
  const std::int64_t blocks = count_blocks(cu_seqlens_k, block_size).all;
  const std::array<std::pair<const char*, const Tensor*>, 3> all{
      {{"features.mean", &features.mean}, {"features.max", &features.max}, {"features.min", &features.min}}};
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& [name, t] = all[i];
    if (t->data == nullptr) continue;
    check_view(name, *t);
    if (t->dtype != k.dtype && t->dtype != DType::f32)
      refuse(name, "expected f32 or the dtype of k, ", name_of(k.dtype), ", got ", name_of(t->dtype));
    if (t->device != k.device) refuse(name, "expected the device of k, got another one");
    if (t->sizes[0] != blocks || t->sizes[1] != k.sizes[1] || t->sizes[2] != k.sizes[2])
      refuse(name, "expected [", blocks, ", ", k.sizes[1], ", ", k.sizes[2], "], got ", sizes_of(*t));
    check_written(name, *t);
    check_apart(name, *t, "k", k);
    for (std::size_t j = 0; j < i; ++j) check_apart(name, *t, all[j].first, *all[j].second);
  }
}

void check_selected(const Outputs& outputs, const Routing& routing, std::int64_t width) {
  if (routing.selection.heads != 0)
    refuse("routing.selection", "expected none (the gate selects), got one of ", routing.selection.heads,
           " heads");
  if (outputs.selection == nullptr)
    refuse("selection", "expected [Hq, Tq, selection_width()] int32, got null");
  check_selection("selection", outputs.selection, outputs.selection_stride, routing, width);
}

void check_execution(const Execution& execution) {
  const Parallel& parallel = execution.parallel;
  if (parallel.threads < 1) refuse("parallel.threads", "expected at least 1, got ", parallel.threads);
  if (!parallel.run && parallel.threads != 1)
    refuse("parallel.run", "expected a function for ", parallel.threads, " threads, got none");
  const Allocator& scratch = execution.scratch;
  if (static_cast<bool>(scratch.allocate) != static_cast<bool>(scratch.release))
    refuse(scratch.allocate ? "scratch.release" : "scratch.allocate",
           "expected both of allocate and release, or neither, got ",
           scratch.allocate ? "allocate" : "release", " alone");
  if (execution.workspace_bytes == std::size_t{0})
    refuse("workspace_bytes", "expected at least 1 or unset, got 0");
}

void check_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Saved& saved, const Routing& routing, std::int64_t width,
                    const Gradients& gradients) {
  check_view("d_out", d_out);
  check_same_shape("d_out", d_out, "q", q);
  check_view("saved.out", saved.out);
  check_same_shape("saved.out", saved.out, "q", q);
  if (saved.lse == nullptr && !is_empty(q)) refuse("saved.lse", "expected [Hq, Tq] f32, got null");
  check_lse(saved.lse);
  check_selection("saved.selection", saved.selection, saved.selection_stride, routing, width);

  struct Named {
    const char* name;
    const Tensor& tensor;
  };
  const std::array<Named, 3> written{{{"dq", gradients.dq}, {"dk", gradients.dk}, {"dv", gradients.dv}}};
  const std::array<Named, 5> read{{{"q", q}, {"k", k}, {"v", v}, {"d_out", d_out}, {"saved.out", saved.out}}};
  for (std::size_t i = 0; i < written.size(); ++i) {
    check_view(written[i].name, written[i].tensor);
    check_same_shape(written[i].name, written[i].tensor, read[i].name, read[i].tensor);
    check_written(written[i].name, written[i].tensor);
    for (const Named& input : read) check_apart(written[i].name, written[i].tensor, input.name, input.tensor);
    for (std::size_t j = 0; j < i; ++j)
      check_apart(written[i].name, written[i].tensor, written[j].name, written[j].tensor);
  }
}

void check_cache_shape(const KvCache::Shape& shape) {
  const std::array<std::pair<const char*, std::int64_t>, 4> counts{{{"kv_heads", shape.kv_heads},
                                                                    {"head_dim", shape.head_dim},
                                                                    {"block_size", shape.block_size},
                                                                    {"sequences", shape.sequences}}};
  for (const auto& [name, count] : counts) {
    if (count < 1) refuse(name, "expected at least 1, got ", count);
  }
  if (shape.dtype == DType::f64 || size_of(shape.dtype) == 0)
    refuse("dtype", "expected f32, bf16, f16 or i8, got ", name_of(shape.dtype));
  constexpr std::int64_t kMaxRowElements = std::int64_t{1} << 31;
  if (shape.kv_heads > kMaxRowElements / shape.head_dim)
    refuse("kv_heads", "expected kv_heads x head_dim of at most ", kMaxRowElements, ", got ", shape.kv_heads,
           " x ", shape.head_dim);
}

void check_truncate(const KvCache& cache, std::int64_t tokens, std::int64_t sequence) {
  check_sequence(cache, sequence);
  const std::int64_t length = cache.length(sequence);
  if (tokens < 0 || tokens > length)
    refuse("tokens", "expected 0 to ", length, " (those held), got ", tokens);
}

namespace {

KvCache::Shape shape_of(const PageLayout& layout) {
  return {.kv_heads = layout.kv_heads,
          .head_dim = layout.head_dim,
          .block_size = layout.block_size,
          .dtype = layout.dtype};
}

/// Checks that `sequence` has room for `added` tokens more.
void check_sequence(const PageLayout& layout, const PagedSequence& sequence, std::int64_t added) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (sequence.length < 0 || sequence.length > kMax || added > kMax - sequence.length)
    refuse("sequence.length", "expected 0 to ", kMax, " tokens, got ", sequence.length, " and ", added,
           " more");
  const std::int64_t length = sequence.length + added;
  const auto pages = static_cast<std::size_t>((length + layout.page_tokens - 1) / layout.page_tokens);
  if (sequence.pages.size() < pages)
    refuse("sequence.pages", "expected at least ", pages, " for ", length, " tokens, got ",
           sequence.pages.size());
  for (std::size_t i = 0; i < pages; ++i) {
    if (sequence.pages[i] == nullptr || reinterpret_cast<std::uintptr_t>(sequence.pages[i]) % 64 != 0)
      refuse("sequence.pages", "expected alignment to 64 bytes, got a null or unaligned page ", i);
  }
  if (length > 0 &&
      (sequence.means == nullptr || reinterpret_cast<std::uintptr_t>(sequence.means) % alignof(float) != 0))
    refuse("sequence.means", "expected f32 values, got a null or unaligned pointer");
}

void check_cached(const Tensor& q, const KvCache::Shape& shape, const Routing& routing) {
  check_new("q", q, shape);
  check_heads(q.sizes[1], "cache", shape.kv_heads);
  check_routing(q, routing);
  if (!routing.causal) refuse("causal", "expected true (a cache takes causal queries only), got false");
  if (routing.block_size != shape.block_size && routing.top_k != Routing::kEverything &&
      routing.selection.heads == 0)
    refuse("block_size", "expected ", shape.block_size, " (the cache's), got ", routing.block_size);
}

void check_new(const Tensor& k, const Tensor& v, const KvCache::Shape& shape) {
  check_new("k", k, shape);
  check_new("v", v, shape);
  if (k.sizes[1] != shape.kv_heads)
    refuse("k", "expected ", shape.kv_heads, " heads (the cache's), got ", k.sizes[1]);
  check_same_shape("v", v, "k", k);
}

}  // namespace

void check_append(const KvCache& cache, const Tensor& k, const Tensor& v, std::int64_t sequence) {
  check_new(k, v, cache.shape());
  check_sequence(cache, sequence);
}

void check_page_layout(const PageLayout& layout) {
  check_cache_shape(shape_of(layout));
  constexpr std::int64_t kMaxPageTokens = std::int64_t{1} << 24;
  if (layout.page_tokens < 1 || layout.page_tokens > kMaxPageTokens)
    refuse("page_tokens", "expected 1 to ", kMaxPageTokens, ", got ", layout.page_tokens);
  if (layout.offset % 64 != 0) refuse("offset", "expected a multiple of 64, got ", layout.offset);
}

void check_append(const Tensor& k, const Tensor& v, const PageLayout& layout, const PagedSequence& sequence) {
  check_page_layout(layout);
  check_new(k, v, shape_of(layout));
  check_sequence(layout, sequence, k.sizes[0]);
}

void check_cached(const Tensor& q, const KvCache& cache, const Routing& routing) {
  check_cached(q, cache.shape(), routing);
}

void check_cached(const Tensor& q, const PageLayout& layout, std::span<const PagedSequence> sequences,
                  const Routing& routing) {
  check_page_layout(layout);
  check_cached(q, shape_of(layout), routing);
  for (const PagedSequence& sequence : sequences) check_sequence(layout, sequence, 0);
}

Tensor page_of(const Tensor& pages) {
  Tensor page = pages;
  page.rank = 3;
  for (std::size_t dim = 0; dim < 3; ++dim) {
    page.sizes[dim] = pages.sizes[dim + 1];
    page.strides[dim] = pages.strides[dim + 1];
  }
  if (pages.sizes[0] == 0) page.sizes[0] = 0;
  return page;
}

namespace {

Tensor checked_page(const char* name, const Tensor& t) {
  if (t.rank != 4)
    refuse(name, "expected rank 4, [pages, page_tokens, kv heads, head_dim], got rank ", t.rank);
  const Tensor page = page_of(t);
  check_view(name, page);
  if (t.sizes[0] < 0) refuse(name, "expected at least 0 pages, got ", t.sizes[0]);
  return page;
}

/// Checks that page and block sizes fit, and that there is a mean for every block.
void check_means(const PagedCache& cache, std::int64_t block_size) {
  const Tensor &k = cache.k, &means = cache.means;
  checked_page("cache.means", means);
  if (k.device == Device::cuda) {
    check_same_kind("cache.means", means, "cache.k", k);
  } else if (means.dtype != DType::f32 || means.device != Device::cpu) {
    refuse("cache.means", "expected f32 in host memory, got ", name_of(means.dtype),
           means.device == Device::cpu ? "" : " on a device");
  }
  const std::int64_t page_tokens = k.sizes[1];
  const std::int64_t blocks =
      page_tokens < block_size ? 1 : std::min(page_tokens, cache.max_seqlen_k) / block_size;
  if (means.sizes[0] != k.sizes[0] || means.sizes[1] < blocks || means.sizes[2] != k.sizes[2] ||
      means.sizes[3] != k.sizes[3])
    refuse("cache.means", "expected [", k.sizes[0], ", ", blocks, " or more, ", k.sizes[2], ", ", k.sizes[3],
           "], got ", sizes_of(means));
  if (cache.max_seqlen_k > page_tokens && block_size % page_tokens != 0 && page_tokens % block_size != 0)
    refuse("block_size", "expected a multiple or a divisor of ", page_tokens,
           " (the tokens of a page of cache.k), got ", block_size);
}

/// Checks the values of the lists, which only the host can read.
void check_lists(const PagedCache& cache) {
  const std::int64_t page_tokens = cache.k.sizes[1], pages = cache.k.sizes[0];
  for (std::int64_t s = 0; s < cache.sequences; ++s) {
    const std::int32_t length = cache.lengths[s], start = cache.starts == nullptr ? 0 : cache.starts[s];
    if (length < 0 || length > cache.max_seqlen_k)
      refuse("cache.lengths", "expected 0 to ", cache.max_seqlen_k, " (max_seqlen_k), got ", length,
             " in sequence ", s);
    if (start < 0 || start > length)
      refuse("cache.starts", "expected 0 to ", length, " (the length), got ", start, " in sequence ", s);
    if (cache.page_table == nullptr || start == length) continue;
    for (std::int64_t i = start / page_tokens; i <= (length - 1) / page_tokens; ++i) {
      const std::int32_t page = cache.page_table[s * cache.table_stride + i];
      if (page < 0 || page >= pages)
        refuse("cache.page_table", "expected 0 to ", pages - 1, " (the pages of cache.k), got ", page,
               " at page ", i, " of sequence ", s);
    }
  }
}

void check_pages(const PagedCache& cache) {
  const Tensor k = checked_page("cache.k", cache.k), v = checked_page("cache.v", cache.v);
  check_same_shape("cache.v", v, "cache.k", k);
  if (cache.v.sizes[0] != cache.k.sizes[0])
    refuse("cache.v", "expected ", cache.k.sizes[0], " pages (as cache.k), got ", cache.v.sizes[0]);
  if (cache.sequences < 0) refuse("cache.sequences", "expected at least 0, got ", cache.sequences);
  if (cache.sequences > 0 && cache.lengths == nullptr)
    refuse("cache.lengths", "expected [", cache.sequences, "] int32, got null");
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  if (cache.max_seqlen_k < 0 || cache.max_seqlen_k > kMax)
    refuse("cache.max_seqlen_k", "expected 0 to ", kMax, ", got ", cache.max_seqlen_k);
  const std::int64_t page_tokens = cache.k.sizes[1];
  if (page_tokens < (cache.max_seqlen_k > 0 ? 1 : 0) || page_tokens > kMax)
    refuse("cache.k", "expected pages of 1 to ", kMax, " tokens, got ", page_tokens);
  const std::int64_t needed = cache.max_seqlen_k == 0 ? 0 : (cache.max_seqlen_k - 1) / page_tokens + 1;
  if (cache.table_stride < needed)
    refuse("cache.table_stride", "expected at least ", needed, " (", cache.max_seqlen_k,
           " tokens in pages of ", page_tokens, "), got ", cache.table_stride);
  if (cache.page_table == nullptr && needed > 0 && cache.k.sizes[0] / cache.table_stride < cache.sequences)
    refuse("cache.k", "expected ", cache.sequences, " x ", cache.table_stride,
           " pages without a page_table, got ", cache.k.sizes[0]);
  if (cache.k.device == Device::cpu) check_lists(cache);
}

}  // namespace

void check_paged(const PagedCache& cache, std::int64_t block_size) {
  check_pages(cache);
  check_means(cache, block_size);
}

void check_paged(const Tensor& q, const PagedCache& cache, const Routing& routing) {
  check_view("q", q);
  check_routing(q, routing);
  if (!routing.causal) refuse("causal", "expected true (a cache takes causal queries only), got false");
  check_pages(cache);
  check_same_kind("cache.k", cache.k, "q", q);
  check_heads(q.sizes[1], "cache.k", cache.k.sizes[2]);
  if (cache.k.sizes[3] != q.sizes[2])
    refuse("cache.k", "expected head_dim ", q.sizes[2], " (that of q), got ", cache.k.sizes[3]);
  if (routing.selection.heads == 0 && routing.top_k > 1 && cache.max_seqlen_k > 0 &&
      routing.top_k <= (cache.max_seqlen_k - 1) / routing.block_size)
    check_means(cache, routing.block_size);
}

void check_paged(const Tensor& q, const std::int32_t* cu_seqlens_q, const PagedCache& cache,
                 const Routing& routing) {
  check_paged(q, cache, routing);
  if (cu_seqlens_q == nullptr) refuse("cu_seqlens_q", "expected [", cache.sequences, " + 1] int32, got null");
  check_offsets("cu_seqlens_q", {cu_seqlens_q, cu_seqlens_q + cache.sequences + 1}, q.sizes[0], "q");
}

void check_update(const PagedCache& cache, const std::int32_t* before, std::int64_t max_added) {
  for (std::int64_t s = 0; s < cache.sequences && before != nullptr; ++s) {
    const std::int64_t added = std::int64_t{cache.lengths[s]} - before[s];
    if (before[s] < 0 || added > max_added)
      refuse("before", "expected ", std::max<std::int64_t>(cache.lengths[s] - max_added, 0),
             " or more (max_added tokens below the length), got ", before[s], " in sequence ", s);
  }
}

void check_decode(const Tensor& q, std::int64_t sequences, const Outputs& outputs) {
  if (q.sizes[0] != sequences)
    refuse("q", "expected ", sequences, " tokens (one for each sequence of the cache), got ", q.sizes[0]);
  if (outputs.selection != nullptr)
    refuse("selection", "expected null (attention on the cache selects), got a pointer");
}

void check_weights(const Outputs& outputs, std::span<const SequenceView> sequences) {
  if (outputs.weights.empty()) return;
  if (outputs.weights.size() != sequences.size())
    refuse("weights", "expected one for each of ", sequences.size(), " sequences or none, got ",
           outputs.weights.size());
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const KeyWeights& weights = outputs.weights[i];
    if (weights.data == nullptr) continue;
    if (reinterpret_cast<std::uintptr_t>(weights.data) % alignof(float) != 0)
      refuse("weights", "expected alignment to f32, got an unaligned pointer");
    if (weights.range < 1) refuse("weights.range", "expected at least 1, got ", weights.range);
    if (weights.keys < 0 || weights.keys > sequences[i].keys)
      refuse("weights.keys", "expected 0 to ", sequences[i].keys, " (those of the sequence), got ",
             weights.keys);
  }
}

void check_sequence(const KvCache& cache, std::int64_t sequence) {
  const std::int64_t sequences = cache.shape().sequences;
  if (sequence < 0 || sequence >= sequences)
    refuse("sequence", "expected 0 to ", sequences - 1, ", got ", sequence);
}

}  // namespace moba
