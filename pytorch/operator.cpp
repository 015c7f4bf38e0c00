/// The PyTorch operator: tensors in, views to libmoba, tensors out. Nothing is computed here. Only torch's
/// stable ABI is used, so that one build of this file serves every torch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "moba/attention.h"
#include "moba/cache.h"

namespace {

using moba::Error;
using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

std::string sizes_text(const TorchTensor& t) {
  std::string text = "[";
  for (std::int64_t dim = 0; dim < t.dim(); ++dim) {
    text += (dim > 0 ? ", " : "") + std::to_string(t.size(dim));
  }
  return text + "]";
}

moba::DType dtype_of(const std::string& function, const char* name, const TorchTensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return moba::DType::f32;
    case ScalarType::BFloat16:
      return moba::DType::bf16;
    case ScalarType::Half:
      return moba::DType::f16;
    case ScalarType::Double:
      return moba::DType::f64;
    default:
      throw Error(function + ": " + name + " is " + torch::headeronly::toString(t.scalar_type()) +
                  "; float32, bfloat16, float16 or float64 is expected");
  }
}

void require_cpu(const std::string& function, const char* name, const TorchTensor& t) {
  if (!t.is_cpu()) throw Error(function + ": " + name + " is not on the CPU, where q is");
}

/// A tensor that libmoba can walk, and its view: strides are taken as they are, except that a last dimension
/// that is not contiguous is copied.
class Argument {
 public:
  Argument(const std::string& function, const char* name, const TorchTensor& given) : tensor_(given) {
    require_cpu(function, name, given);
    if (given.dim() != 3) {
      throw Error(function + ": " + name + " has sizes " + sizes_text(given) +
                  "; [tokens, heads, head_dim] is expected");
    }
    if (given.size(2) > 1 && given.stride(2) != 1) tensor_ = torch::stable::contiguous(given);
    view_.dtype = dtype_of(function, name, given);
    view_.data = tensor_.data_ptr();
    view_.rank = 3;
    for (std::size_t dim = 0; dim < 3; ++dim) {
      view_.sizes[dim] = tensor_.size(static_cast<std::int64_t>(dim));
      view_.strides[dim] = tensor_.stride(static_cast<std::int64_t>(dim));
    }
    view_.strides[2] = 1;  // what an empty tensor says of itself means nothing
  }

  const moba::Tensor& view() const { return view_; }
  const TorchTensor& tensor() const { return tensor_; }

 private:
  TorchTensor tensor_;
  moba::Tensor view_{};
};

std::vector<std::int32_t> offsets_of(const std::string& function, const char* name, const TorchTensor& t) {
  require_cpu(function, name, t);
  if (t.dim() != 1 || t.scalar_type() != ScalarType::Int) {
    throw Error(function + ": " + name + " is " + torch::headeronly::toString(t.scalar_type()) + " " +
                sizes_text(t) + "; int32 [sequences + 1] is expected");
  }
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(t.size(0)));
  const auto* data = static_cast<const std::int32_t*>(t.data_ptr());
  const std::int64_t stride = t.stride(0);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = data[static_cast<std::int64_t>(i) * stride];
  return offsets;
}

/// The threads of torch's pool: as many as torch.set_num_threads says. Its parallel_for hands every thread an
/// equal share, so the threads themselves are what is shared out, and tasks are drawn one by one.
moba::Parallel torch_threads() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  return {threads, [threads](std::int64_t tasks, const moba::Parallel::Body& body) {
            std::atomic<std::int64_t> next{0};
            const auto draw = [&](std::int64_t worker, std::int64_t) {
              for (std::int64_t task = next++; task < tasks; task = next++)
                body(task, static_cast<int>(worker));
            };
            torch::stable::parallel_for(0, std::min<std::int64_t>(threads, tasks), 1, draw);
          }};
}

TorchTensor bytes_of(std::size_t bytes) {
  const auto size = static_cast<std::int64_t>(bytes);
  const std::int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return TorchTensor(handle);
}

/// Scratch memory out of torch's allocator, as tensors of bytes. What is small lies in one that each thread
/// keeps from call to call, as a stack: glibc's aligned allocation, which torch's is, may never find again
/// what small calls gave back, and a process that makes many of them then grows without end.
class Scratch {
 public:
  moba::Allocator allocator() {
    return {[this](std::size_t bytes) { return allocate(bytes); },
            [this](void* memory, std::size_t bytes) { release(static_cast<std::byte*>(memory), bytes); }};
  }

 private:
  static constexpr std::size_t kKept = std::size_t{1} << 20, kAlignment = 64;

  static std::byte* kept() {
    thread_local const TorchTensor bytes = bytes_of(kKept);
    return static_cast<std::byte*>(bytes.data_ptr());
  }

  static std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  void* allocate(std::size_t bytes) {
    if (aligned(bytes) <= kKept - top_) {
      void* memory = kept() + top_;
      top_ += aligned(bytes);
      return memory;
    }
    held_.push_back(bytes_of(bytes));
    return held_.back().data_ptr();
  }

  void release(std::byte* memory, std::size_t bytes) {
    if (memory >= kept() && memory < kept() + kKept) {
      if (memory + aligned(bytes) == kept() + top_)
        top_ -= aligned(bytes);  // what is not on top waits for the call's end
      return;
    }
    const auto found = std::find_if(held_.rbegin(), held_.rend(),
                                    [&](const TorchTensor& tensor) { return tensor.data_ptr() == memory; });
    held_.erase(std::prev(found.base()));
  }

  std::size_t top_ = 0;
  std::vector<TorchTensor> held_;
};

struct Call {
  std::string function;
  moba::Sequences sequences{};
  moba::Routing routing;
  Scratch scratch{};

  Call(std::string name, const TorchTensor& cu_seqlens_q, const TorchTensor& cu_seqlens_k,
       std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks, bool causal,
       std::optional<double> scale)
      : Call(std::move(name), block_size, top_k, sink_blocks, scale) {
    sequences.q = offsets_of(function, "cu_seqlens_q", cu_seqlens_q);
    sequences.k = offsets_of(function, "cu_seqlens_k", cu_seqlens_k);
    routing.causal = causal;
  }

  Call(std::string name, std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks,
       std::optional<double> scale)
      : function(std::move(name)),
        routing{.block_size = block_size, .top_k = top_k, .sink_blocks = sink_blocks} {
    if (scale) routing.scale = static_cast<float>(*scale);
  }

  /// float64 is for the reference alone, so it need not be asked for.
  moba::Execution execution(const std::string& backend, moba::DType dtype) {
    moba::Execution execution;
    execution.backend = backend.empty() && dtype == moba::DType::f64 ? "reference" : backend;
    execution.parallel = torch_threads();
    execution.scratch = scratch.allocator();
    return execution;
  }

  /// Entries of a row of the operator's selection. Known from shapes alone, as torch.compile needs it, and so
  /// at least as many as libmoba writes, whose rows are only as long as the longest sequence asks for.
  std::int64_t width(std::int64_t keys) const {
    if (routing.block_size < 1 || routing.top_k < 1) return 0;  // refused behind the door
    return std::min(routing.top_k, keys == 0 ? 0 : (keys - 1) / routing.block_size + 1);
  }
};

TorchTensor empty(const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<std::int64_t>(sizes[dim], 1);
  AtenTensorHandle handle = nullptr;
  const auto number = torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), number, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return TorchTensor(handle);
}

TorchTensor empty_like(const Argument& model) {
  const auto& sizes = model.view().sizes;
  return empty({sizes[0], sizes[1], sizes[2]}, model.tensor().scalar_type());
}

/// The forward's selection [Hq, Tq, width], to be written by libmoba and read by torch.
TorchTensor spread_rows(TorchTensor selection, std::int64_t written) {
  const std::int64_t rows = selection.size(0) * selection.size(1), width = selection.size(2);
  auto* blocks = static_cast<std::int32_t*>(selection.data_ptr());
  if (written == width) return selection;
  for (std::int64_t row = rows; row-- > 0;) {  // from the last, for each row moves towards the end
    std::copy_backward(blocks + row * written, blocks + (row + 1) * written, blocks + row * width + written);
    std::fill(blocks + row * width + written, blocks + (row + 1) * width, -1);
  }
  return selection;
}

const float* lse_of(const std::string& function, const TorchTensor& lse, const moba::Tensor& q) {
  require_cpu(function, "lse", lse);
  if (lse.dim() != 2 || lse.size(0) != q.sizes[1] || lse.size(1) != q.sizes[0] ||
      lse.scalar_type() != ScalarType::Float || !lse.is_contiguous()) {
    throw Error(function + ": lse has sizes " + sizes_text(lse) +
                "; contiguous [q heads, q tokens] of float32 is expected");
  }
  return static_cast<const float*>(lse.data_ptr());
}

/// The forward's selection as libmoba wants it. Null when there is none, and it is then selected again.
class SavedSelection {
 public:
  SavedSelection(const Call& call, const moba::Tensor& q, std::int64_t keys, const TorchTensor& given) {
    require_cpu(call.function, "selection", given);
    const std::int64_t width = call.width(keys);
    if (given.dim() != 3 || given.size(0) != q.sizes[1] || given.size(1) != q.sizes[0] ||
        (given.size(2) != width && given.size(2) != 0) || given.scalar_type() != ScalarType::Int ||
        !given.is_contiguous()) {
      throw Error(call.function + ": selection has sizes " + sizes_text(given) + "; contiguous [" +
                  std::to_string(q.sizes[1]) + ", " + std::to_string(q.sizes[0]) + ", " +
                  std::to_string(width) + " or 0] of int32 is expected");
    }
    if (given.numel() == 0) return;
    blocks_ = static_cast<const std::int32_t*>(given.data_ptr());
    const std::int64_t wanted = moba::selection_width(call.sequences, call.routing);
    if (wanted >= width) return;
    for (std::int64_t row = 0; row < q.sizes[0] * q.sizes[1]; ++row)
      narrow_.insert(narrow_.end(), blocks_ + row * width, blocks_ + row * width + wanted);
    blocks_ = narrow_.data();
  }

  const std::int32_t* blocks() const { return blocks_; }

 private:
  const std::int32_t* blocks_ = nullptr;
  std::vector<std::int32_t> narrow_;
};

std::tuple<TorchTensor, TorchTensor, TorchTensor> attention(
    const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, const TorchTensor& cu_seqlens_q,
    const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k, std::int64_t sink_blocks,
    bool causal, std::optional<double> scale, bool return_selection, std::string backend) {
  Call call("attention", cu_seqlens_q, cu_seqlens_k, block_size, top_k, sink_blocks, causal, scale);
  const Argument queries(call.function, "q", q), keys(call.function, "k", k), values(call.function, "v", v);
  TorchTensor out = empty_like(queries);
  TorchTensor lse = empty({q.size(1), q.size(0)}, ScalarType::Float);
  TorchTensor selection =
      empty({q.size(1), q.size(0), return_selection ? call.width(k.size(0)) : 0}, ScalarType::Int);
  moba::attention(
      queries.view(), keys.view(), values.view(), call.sequences, call.routing,
      {.out = Argument(call.function, "out", out).view(),
       .lse = static_cast<float*>(lse.data_ptr()),
       .selection = selection.numel() > 0 ? static_cast<std::int32_t*>(selection.data_ptr()) : nullptr},
      call.execution(backend, queries.view().dtype));
  if (selection.numel() > 0)
    selection = spread_rows(selection, moba::selection_width(call.sequences, call.routing));
  return {out, lse, selection};
}

std::tuple<TorchTensor, TorchTensor, TorchTensor> attention_backward(
    const TorchTensor& d_out, const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
    const TorchTensor& out, const TorchTensor& lse, const TorchTensor& selection,
    const TorchTensor& cu_seqlens_q, const TorchTensor& cu_seqlens_k, std::int64_t block_size,
    std::int64_t top_k, std::int64_t sink_blocks, bool causal, std::optional<double> scale,
    std::string backend) {
  Call call("attention_backward", cu_seqlens_q, cu_seqlens_k, block_size, top_k, sink_blocks, causal, scale);
  const Argument gradient(call.function, "d_out", d_out), queries(call.function, "q", q),
      keys(call.function, "k", k), values(call.function, "v", v), forward(call.function, "out", out);
  const SavedSelection saved(call, queries.view(), k.size(0), selection);
  TorchTensor dq = empty_like(queries), dk = empty_like(keys), dv = empty_like(values);
  moba::attention_backward(
      gradient.view(), queries.view(), keys.view(), values.view(),
      {.out = forward.view(), .lse = lse_of(call.function, lse, queries.view()), .selection = saved.blocks()},
      call.sequences, call.routing,
      {.dq = Argument(call.function, "dq", dq).view(),
       .dk = Argument(call.function, "dk", dk).view(),
       .dv = Argument(call.function, "dv", dv).view()},
      call.execution(backend, queries.view().dtype));
  return {dq, dk, dv};
}

TorchTensor select_blocks(const TorchTensor& q, const TorchTensor& k, const TorchTensor& cu_seqlens_q,
                          const TorchTensor& cu_seqlens_k, std::int64_t block_size, std::int64_t top_k,
                          std::int64_t sink_blocks, bool causal, std::string backend) {
  Call call("select_blocks", cu_seqlens_q, cu_seqlens_k, block_size, top_k, sink_blocks, causal, {});
  const Argument queries(call.function, "q", q), keys(call.function, "k", k);
  TorchTensor selection = empty({q.size(1), q.size(0), call.width(k.size(0))}, ScalarType::Int);
  std::int32_t nowhere = 0;  // an empty tensor has no memory of its own
  moba::select_blocks(queries.view(), keys.view(), call.sequences, call.routing,
                      selection.numel() > 0 ? static_cast<std::int32_t*>(selection.data_ptr()) : &nowhere,
                      call.execution(backend, queries.view().dtype));
  if (selection.numel() > 0)
    selection = spread_rows(selection, moba::selection_width(call.sequences, call.routing));
  return selection;
}

/// Rows [begin, end) of sequence `index` of a [sequences, tokens, heads, head_dim] tensor.
moba::Tensor row_of(const TorchTensor& t, moba::DType dtype, std::int64_t index, std::int64_t begin,
                    std::int64_t end) {
  const auto offset = static_cast<std::size_t>(index * t.stride(0) + begin * t.stride(1));
  return {.data = static_cast<std::byte*>(t.data_ptr()) + offset * moba::size_of(dtype),
          .dtype = dtype,
          .rank = 3,
          .sizes = {end - begin, t.size(2), t.size(3)},
          .strides = {t.stride(1), t.stride(2), t.stride(3)}};
}

void require_rows(const std::string& function, const char* name, const TorchTensor& t,
                  std::int64_t sequences) {
  require_cpu(function, name, t);
  if (t.dim() != 4 || t.size(0) != sequences) {
    throw Error(function + ": " + name + " has sizes " + sizes_text(t) + "; [" + std::to_string(sequences) +
                ", tokens or blocks, heads, head_dim] is expected");
  }
}

std::tuple<TorchTensor, TorchTensor> decode(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
                                            const TorchTensor& means, const TorchTensor& begin,
                                            const TorchTensor& end, std::int64_t block_size,
                                            std::int64_t top_k, std::int64_t sink_blocks,
                                            std::optional<double> scale, std::string backend) {
  const std::string function = "decode";
  const Argument queries(function, "q", q);
  const std::int64_t sequences = q.size(0);
  require_rows(function, "k", k, sequences);
  require_rows(function, "v", v, sequences);
  require_rows(function, "means", means, sequences);
  const moba::DType k_dtype = dtype_of(function, "k", k), v_dtype = dtype_of(function, "v", v),
                    means_dtype = dtype_of(function, "means", means);
  const std::vector<std::int32_t> from = offsets_of(function, "begin", begin),
                                  to = offsets_of(function, "end", end);
  if (static_cast<std::int64_t>(from.size()) != sequences || to.size() != from.size())
    throw Error(function + ": begin and end have " + std::to_string(from.size()) + " and " +
                std::to_string(to.size()) + " entries; q has " + std::to_string(sequences) + " sequences");

  std::vector<moba::CachedSequence> cached;
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t first = from[static_cast<std::size_t>(s)], last = to[static_cast<std::size_t>(s)];
    if (first < 0 || last < first || last > k.size(1) || last > v.size(1)) {
      throw Error(function + ": begin and end of sequence " + std::to_string(s) + " are " +
                  std::to_string(first) + " and " + std::to_string(last) + "; k has " +
                  std::to_string(k.size(1)) + " tokens and v " + std::to_string(v.size(1)));
    }
    cached.push_back({row_of(k, k_dtype, s, first, last), row_of(v, v_dtype, s, first, last),
                      row_of(means, means_dtype, s, 0, means.size(1))});
  }

  TorchTensor out = empty_like(queries), lse = empty({q.size(1), sequences}, ScalarType::Float);
  Call call(function, block_size, top_k, sink_blocks, scale);
  moba::decode(queries.view(), cached, call.routing,
               {.out = Argument(function, "out", out).view(), .lse = static_cast<float*>(lse.data_ptr())},
               call.execution(backend, queries.view().dtype));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY(moba, library) {
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

STABLE_TORCH_LIBRARY_IMPL(moba, CPU, library) {
  library.impl("attention", TORCH_BOX(&attention));
  library.impl("attention_backward", TORCH_BOX(&attention_backward));
  library.impl("decode", TORCH_BOX(&decode));
  library.impl("select", TORCH_BOX(&select_blocks));
}
