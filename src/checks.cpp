#include "checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

namespace moba {
namespace {

/// Messages read "function: argument is what was found; what was expected".
template <typename... Parts>
[[noreturn]] void refuse(std::string_view function, const Parts&... parts) {
  std::string message(function);
  message += ": ";
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (add(parts), ...);
  throw Error(message);
}

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

/// False when a byte offset of the view, or the number of its bytes, does not fit 64 bits.
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

/// Whether the two are different columns of one matrix with a token in each row, as q, k and v are that come
/// out of one product. Both have spans.
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

/// Whether each dimension steps clear of everything that the finer ones reach: then no two elements coincide.
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

/// A view [tokens, heads, head_dim] that the library can walk.
void check_view(std::string_view function, const char* name, const Tensor& t) {
  if (t.rank != 3) refuse(function, name, " has rank ", t.rank, "; [tokens, heads, head_dim] is expected");
  for (std::size_t dim = 0; dim < 3; ++dim) {
    if (t.sizes[dim] < 0) refuse(function, name, " has sizes ", sizes_of(t), "; none may be negative");
  }
  if (t.sizes[1] < 1 || t.sizes[2] < 1)
    refuse(function, name, " has sizes ", sizes_of(t),
           "; at least one head and a head_dim of 1 are expected");
  if (size_of(t.dtype) == 0 || t.dtype == DType::i8)
    refuse(function, name, " is ", name_of(t.dtype), "; f32, bf16, f16 or f64 is expected");
  if (t.sizes[2] > 1 && t.strides[2] != 1)
    refuse(function, name, " has stride ", t.strides[2],
           " in its last dimension; that one must be contiguous");
  Span span;
  if (!span_of(t, span))
    refuse(function, name, " has sizes ", sizes_of(t), " and strides beyond what 64 bits can address");
  if (is_empty(t)) return;
  if (t.data == nullptr) refuse(function, name, " is null; ", sizes_of(t), " elements are expected");
  if (reinterpret_cast<std::uintptr_t>(t.data) % size_of(t.dtype) != 0)
    refuse(function, name, " is not aligned to its dtype ", name_of(t.dtype));
}

void check_same_kind(std::string_view function, const char* name, const Tensor& t, const char* model_name,
                     const Tensor& model) {
  if (t.dtype != model.dtype)
    refuse(function, name, " is ", name_of(t.dtype), "; ", model_name, " is ", name_of(model.dtype));
  if (t.device != model.device) refuse(function, name, " is on another device than ", model_name);
}

void check_same_shape(std::string_view function, const char* name, const Tensor& t, const char* model_name,
                      const Tensor& model) {
  check_same_kind(function, name, t, model_name, model);
  if (!std::equal(t.sizes.begin(), t.sizes.begin() + 3, model.sizes.begin()))
    refuse(function, name, " has sizes ", sizes_of(t), "; those of ", model_name, ", ", sizes_of(model),
           ", are expected");
}

/// Something that the call writes.
void check_written(std::string_view function, const char* name, const Tensor& t) {
  if (!is_empty(t) && overlaps_itself(t))
    refuse(function, name, " has strides that lead to the same element twice");
}

void check_apart(std::string_view function, const char* name, const Tensor& t, const char* other_name,
                 const Tensor& other) {
  if (share_memory(t, other)) refuse(function, name, " shares memory with ", other_name);
}

void check_heads(std::string_view function, std::int64_t q_heads, const char* name, std::int64_t kv_heads) {
  if (q_heads % kv_heads != 0)
    refuse(function, name, " has ", kv_heads, " heads; ", q_heads, " query heads need a divisor of ",
           q_heads);
}

void check_offsets(std::string_view function, const char* name, const std::vector<std::int32_t>& offsets,
                   std::int64_t tokens, const char* tensor) {
  if (offsets.front() != 0) refuse(function, name, " starts at ", offsets.front(), "; 0 is expected");
  for (std::size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] < offsets[i - 1])
      refuse(function, name, " falls from ", offsets[i - 1], " to ", offsets[i], " at entry ", i,
             "; it may never decrease");
  }
  if (offsets.back() != tokens)
    refuse(function, name, " ends at ", offsets.back(), "; ", tensor, " has ", tokens, " tokens");
}

void check_lse(std::string_view function, const float* lse) {
  if (reinterpret_cast<std::uintptr_t>(lse) % alignof(float) != 0)
    refuse(function, "lse is not aligned to f32");
}

void check_selection(std::string_view function, const std::int32_t* selection) {
  if (reinterpret_cast<std::uintptr_t>(selection) % alignof(std::int32_t) != 0)
    refuse(function, "selection is not aligned to int32");
}

/// New keys, values or queries for a cache: 16 or 32 bits wide, on the CPU.
void check_new(std::string_view function, const char* name, const Tensor& t, const KvCache::Shape& shape) {
  check_view(function, name, t);
  if (t.dtype == DType::f64) refuse(function, name, " is f64; f32, bf16 or f16 is expected");
  if (t.device != Device::cpu) refuse(function, name, " is not on the CPU, where the cache is");
  if (t.sizes[2] != shape.head_dim)
    refuse(function, name, " has head_dim ", t.sizes[2], "; the cache has ", shape.head_dim);
}

}  // namespace

namespace {

void check_tensors(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_view(function, "q", q);
  check_view(function, "k", k);
  check_view(function, "v", v);
  check_same_kind(function, "k", k, "q", q);
  check_heads(function, q.sizes[1], "k", k.sizes[1]);
  if (k.sizes[2] != q.sizes[2]) refuse(function, "k has head_dim ", k.sizes[2], "; q has ", q.sizes[2]);
  check_same_shape(function, "v", v, "k", k);
}

}  // namespace

void check_attention(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
                     const DeviceSequences& sequences, const Routing& routing) {
  check_tensors(function, q, k, v);
  if (sequences.count < 0)
    refuse(function, "sequences.count is ", sequences.count, "; at least 0 is expected");
  if (sequences.count > 0 && (sequences.q == nullptr || sequences.k == nullptr))
    refuse(function, "sequences.", sequences.q == nullptr ? "q" : "k", " is null; [", sequences.count,
           " + 1] int32 on the device is expected");
  if (sequences.longest < 0 || sequences.longest > std::numeric_limits<std::int32_t>::max())
    refuse(function, "sequences.longest is ", sequences.longest, "; 0 to ",
           std::numeric_limits<std::int32_t>::max(), " are expected");
  check_routing(function, routing);
}

void check_attention(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Sequences& sequences, const Routing& routing) {
  check_tensors(function, q, k, v);
  if (sequences.q.empty()) refuse(function, "sequences.q is empty; it starts with 0");
  if (sequences.q.size() != sequences.k.size())
    refuse(function, "sequences.k has ", sequences.k.size(), " entries; sequences.q has ",
           sequences.q.size());
  check_offsets(function, "sequences.q", sequences.q, q.sizes[0], "q");
  check_offsets(function, "sequences.k", sequences.k, k.sizes[0], "k");
  check_routing(function, routing);
}

void check_routing(std::string_view function, const Routing& routing) {
  if (routing.block_size < 1)
    refuse(function, "block_size is ", routing.block_size, "; at least 1 is expected");
  if (routing.top_k < 1) refuse(function, "top_k is ", routing.top_k, "; at least 1 is expected");
  if (routing.own_block && routing.causal)
    refuse(function, "own_block is set for causal routing; there every query has its own block anyway");
  const std::int64_t most_sinks = routing.top_k - (routing.causal || routing.own_block ? 1 : 0);
  if (routing.sink_blocks < 0 || routing.sink_blocks > most_sinks)
    refuse(function, "sink_blocks is ", routing.sink_blocks, "; 0 to ", most_sinks, " go with top_k ",
           routing.top_k);
  if (routing.scale && !std::isfinite(*routing.scale))
    refuse(function, "scale is ", *routing.scale, "; a finite number is expected");
}

void check_outputs(std::string_view function, const Tensor& q, const Outputs& outputs) {
  check_view(function, "out", outputs.out);
  check_same_shape(function, "out", outputs.out, "q", q);
  check_written(function, "out", outputs.out);
  check_apart(function, "out", outputs.out, "q", q);
  check_lse(function, outputs.lse);
  check_selection(function, outputs.selection);
}

void check_apart_from_keys(std::string_view function, const Outputs& outputs, const Tensor& k,
                           const Tensor& v) {
  check_apart(function, "out", outputs.out, "k", k);
  check_apart(function, "out", outputs.out, "v", v);
}

void check_execution(std::string_view function, const Execution& execution) {
  const Parallel& parallel = execution.parallel;
  if (parallel.threads < 1)
    refuse(function, "parallel has ", parallel.threads, " threads; at least 1 is expected");
  if (!parallel.run && parallel.threads != 1)
    refuse(function, "parallel has ", parallel.threads, " threads and no run");
  const Allocator& scratch = execution.scratch;
  if (static_cast<bool>(scratch.allocate) != static_cast<bool>(scratch.release))
    refuse(function, "scratch has only ", scratch.allocate ? "allocate" : "release",
           "; allocate and release go together");
  if (execution.workspace_bytes == std::size_t{0})
    refuse(function, "workspace_bytes is 0; leave it unset for the default");
}

void check_backward(std::string_view function, const Tensor& d_out, const Tensor& q, const Tensor& k,
                    const Tensor& v, const Saved& saved, const Gradients& gradients) {
  check_view(function, "d_out", d_out);
  check_same_shape(function, "d_out", d_out, "q", q);
  check_view(function, "saved.out", saved.out);
  check_same_shape(function, "saved.out", saved.out, "q", q);
  if (saved.lse == nullptr && !is_empty(q)) refuse(function, "saved.lse is null; [Hq, Tq] f32 is expected");
  check_lse(function, saved.lse);
  check_selection(function, saved.selection);

  struct Named {
    const char* name;
    const Tensor& tensor;
  };
  const std::array<Named, 3> written{{{"dq", gradients.dq}, {"dk", gradients.dk}, {"dv", gradients.dv}}};
  const std::array<Named, 5> read{{{"q", q}, {"k", k}, {"v", v}, {"d_out", d_out}, {"saved.out", saved.out}}};
  for (std::size_t i = 0; i < written.size(); ++i) {
    check_view(function, written[i].name, written[i].tensor);
    check_same_shape(function, written[i].name, written[i].tensor, read[i].name, read[i].tensor);
    check_written(function, written[i].name, written[i].tensor);
    for (const Named& input : read)
      check_apart(function, written[i].name, written[i].tensor, input.name, input.tensor);
    for (std::size_t j = 0; j < i; ++j)
      check_apart(function, written[i].name, written[i].tensor, written[j].name, written[j].tensor);
  }
}

void check_cache_shape(const KvCache::Shape& shape) {
  constexpr std::string_view function = "KvCache";
  const std::array<std::pair<const char*, std::int64_t>, 4> counts{{{"kv_heads", shape.kv_heads},
                                                                    {"head_dim", shape.head_dim},
                                                                    {"block_size", shape.block_size},
                                                                    {"sequences", shape.sequences}}};
  for (const auto& [name, count] : counts) {
    if (count < 1) refuse(function, name, " is ", count, "; at least 1 is expected");
  }
  if (shape.dtype == DType::f64 || size_of(shape.dtype) == 0)
    refuse(function, "dtype is ", name_of(shape.dtype), "; f32, bf16, f16 or i8 is expected");
  constexpr std::int64_t kMostRowElements = std::int64_t{1} << 31;
  if (shape.kv_heads > kMostRowElements / shape.head_dim)
    refuse(function, "kv_heads is ", shape.kv_heads, " and head_dim ", shape.head_dim,
           "; their product may be at most ", kMostRowElements);
}

void check_append(const KvCache& cache, const Tensor& k, const Tensor& v, std::int64_t sequence) {
  constexpr std::string_view function = "KvCache::append";
  const KvCache::Shape& shape = cache.shape();
  check_new(function, "k", k, shape);
  check_new(function, "v", v, shape);
  if (k.sizes[1] != shape.kv_heads)
    refuse(function, "k has ", k.sizes[1], " heads; the cache has ", shape.kv_heads);
  check_same_shape(function, "v", v, "k", k);
  check_sequence(function, cache, sequence);
}

void check_cached(std::string_view function, const Tensor& q, const KvCache& cache, const Routing& routing) {
  const KvCache::Shape& shape = cache.shape();
  check_new(function, "q", q, shape);
  check_heads(function, q.sizes[1], "cache", shape.kv_heads);
  check_routing(function, routing);
  if (!routing.causal) refuse(function, "causal is not set; a cache answers causal queries only");
  if (routing.block_size != shape.block_size && routing.top_k != Routing::kEverything)
    refuse(function, "block_size is ", routing.block_size, "; the cache keeps means of blocks of ",
           shape.block_size);
}

void check_cached(const Tensor& q, std::span<const CachedSequence> sequences, const Routing& routing) {
  constexpr std::string_view function = "decode";
  check_view(function, "q", q);
  check_routing(function, routing);
  if (!routing.causal) refuse(function, "causal is not set; a cache answers causal queries only");
  bool choosing = false;
  for (const CachedSequence& s : sequences) {
    const CachedSequence& first = sequences.front();
    check_view(function, "k", s.k);
    check_view(function, "v", s.v);
    check_same_kind(function, "k", s.k, "q", q);
    check_heads(function, q.sizes[1], "k", s.k.sizes[1]);
    if (s.k.sizes[2] != q.sizes[2]) refuse(function, "k has head_dim ", s.k.sizes[2], "; q has ", q.sizes[2]);
    check_same_shape(function, "v", s.v, "k", s.k);
    if (s.k.sizes[1] != first.k.sizes[1] || s.k.strides != first.k.strides || s.v.strides != first.v.strides)
      refuse(function, "k and v have other heads or strides than those of the first sequence");
    choosing |= s.k.sizes[0] > 0 && routing.top_k <= (s.k.sizes[0] - 1) / routing.block_size;
  }
  if (!choosing) return;
  for (const CachedSequence& s : sequences) {
    const CachedSequence& first = sequences.front();
    const std::int64_t blocks = s.k.sizes[0] / routing.block_size;
    check_view(function, "means", s.means);
    if (s.means.dtype != DType::f32)
      refuse(function, "means is ", name_of(s.means.dtype), "; f32 is expected");
    if (s.means.sizes[0] < blocks || s.means.sizes[1] != s.k.sizes[1] || s.means.sizes[2] != s.k.sizes[2])
      refuse(function, "means has sizes ", sizes_of(s.means), "; at least [", blocks, ", ", s.k.sizes[1],
             ", ", s.k.sizes[2], "] is expected");
    if (s.means.strides != first.means.strides)
      refuse(function, "means has other strides than that of the first sequence");
  }
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

Tensor checked_page(std::string_view function, const char* name, const Tensor& t) {
  if (t.rank != 4)
    refuse(function, name, " has rank ", t.rank, "; [pages, page_tokens, kv heads, head_dim] is expected");
  const Tensor page = page_of(t);
  check_view(function, name, page);
  if (t.sizes[0] < 0) refuse(function, name, " has ", t.sizes[0], " pages");
  return page;
}

/// That the pages go into blocks, and that there is a mean for each.
void check_means(std::string_view function, const PagedCache& cache, std::int64_t block_size) {
  const Tensor &k = cache.k, &means = cache.means;
  checked_page(function, "cache.means", means);
  check_same_kind(function, "cache.means", means, "cache.k", k);
  const std::int64_t page_tokens = k.sizes[1];
  const std::int64_t blocks =
      page_tokens < block_size ? 1 : std::min(page_tokens, cache.longest) / block_size;
  if (means.sizes[0] != k.sizes[0] || means.sizes[1] < blocks || means.sizes[2] != k.sizes[2] ||
      means.sizes[3] != k.sizes[3])
    refuse(function, "cache.means has sizes ", sizes_of(means), "; [", k.sizes[0], ", ", blocks, " or more, ",
           k.sizes[2], ", ", k.sizes[3], "] is expected");
  if (cache.longest > page_tokens && block_size % page_tokens != 0 && page_tokens % block_size != 0)
    refuse(function, "block_size is ", block_size, "; a multiple or a divisor of cache.k's pages of ",
           page_tokens, " tokens is expected");
}

void check_pages(std::string_view function, const PagedCache& cache) {
  const Tensor k = checked_page(function, "cache.k", cache.k), v = checked_page(function, "cache.v", cache.v);
  check_same_shape(function, "cache.v", v, "cache.k", k);
  if (cache.v.sizes[0] != cache.k.sizes[0])
    refuse(function, "cache.v has ", cache.v.sizes[0], " pages; cache.k has ", cache.k.sizes[0]);
  if (cache.sequences < 0) refuse(function, "cache.sequences is ", cache.sequences);
  if (cache.sequences > 0 && cache.lengths == nullptr)
    refuse(function, "cache.lengths is null; int32 on the device are expected");
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  if (cache.longest < 0 || cache.longest > kMost)
    refuse(function, "cache.longest is ", cache.longest, "; 0 to ", kMost, " are expected");
  const std::int64_t page_tokens = cache.k.sizes[1];
  if (page_tokens < (cache.longest > 0 ? 1 : 0) || page_tokens > kMost)
    refuse(function, "cache.k has pages of ", page_tokens, " tokens; 1 to ", kMost, " are expected");
  const std::int64_t needed = cache.longest == 0 ? 0 : (cache.longest - 1) / page_tokens + 1;
  if (cache.table_stride < needed)
    refuse(function, "cache.table_stride is ", cache.table_stride, "; ", cache.longest, " tokens need ",
           needed, " pages of ", page_tokens);
  if (cache.page_table == nullptr && needed > 0 && cache.k.sizes[0] / cache.table_stride < cache.sequences)
    refuse(function, "cache.k has ", cache.k.sizes[0], " pages and no page_table; ", cache.sequences,
           " times ", cache.table_stride, " are expected");
}

}  // namespace

void check_paged(std::string_view function, const PagedCache& cache, std::int64_t block_size) {
  check_pages(function, cache);
  check_means(function, cache, block_size);
}

void check_paged(std::string_view function, const Tensor& q, const PagedCache& cache,
                 const Routing& routing) {
  check_view(function, "q", q);
  check_routing(function, routing);
  if (!routing.causal) refuse(function, "causal is not set; a cache answers causal queries only");
  check_pages(function, cache);
  check_same_kind(function, "cache.k", cache.k, "q", q);
  check_heads(function, q.sizes[1], "cache.k", cache.k.sizes[2]);
  if (cache.k.sizes[3] != q.sizes[2])
    refuse(function, "cache.k has head_dim ", cache.k.sizes[3], "; q has ", q.sizes[2]);
  if (routing.top_k > 1 && cache.longest > 0 && routing.top_k <= (cache.longest - 1) / routing.block_size)
    check_means(function, cache, routing.block_size);
}

void check_decode(const Tensor& q, std::int64_t sequences, const Outputs& outputs) {
  if (q.sizes[0] != sequences)
    refuse("decode", "q has ", q.sizes[0], " tokens; the cache has ", sequences, " sequences");
  if (outputs.selection != nullptr)
    refuse("decode", "selection is set; select with attention on the cache instead");
}

void check_sequence(std::string_view function, const KvCache& cache, std::int64_t sequence) {
  const std::int64_t sequences = cache.shape().sequences;
  if (sequence < 0 || sequence >= sequences)
    refuse(function, "sequence is ", sequence, "; the cache has ", sequences);
}

}  // namespace moba
