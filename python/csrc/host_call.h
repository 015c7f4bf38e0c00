/// Calls on the CPU, with torch's threads and memory from its allocator.
#pragma once

#include <atomic>
#include <deque>
#include <optional>

#include "interrupt.h"
#include "tensors.h"

namespace moba::pytorch {

/// Returns the elements of an int32 tensor [sequences + 1]; throws ArgumentError for another dtype, rank or
/// device.
inline std::vector<std::int32_t> offsets_of(const char* name, const TorchTensor& t) {
  check_offsets(name, t, {});
  std::vector<std::int32_t> offsets(static_cast<std::size_t>(t.size(0)));
  const auto* data = static_cast<const std::int32_t*>(t.data_ptr());
  const std::int64_t stride = t.stride(0);
  for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = data[static_cast<std::int64_t>(i) * stride];
  return offsets;
}

/// Runs tasks on torch's pool of torch.get_num_threads() threads. parallel_for splits its range evenly, so
/// its range is the workers, and each worker draws tasks one by one.
inline Parallel torch_threads() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  return {threads, [threads](std::int64_t tasks, const Parallel::Body& body) {
            std::atomic<std::int64_t> next{0};
            const auto work = [&](std::int64_t worker, std::int64_t) {
              for (std::int64_t task = next++; task < tasks; task = next++)
                body(task, static_cast<int>(worker));
            };
            torch::stable::parallel_for(0, std::min<std::int64_t>(threads, tasks), 1, work);
          }};
}

/// Scratch memory from torch's allocator, as tensors of bytes. Small allocations come from a stack that each
/// thread keeps between calls: glibc's aligned allocation, which torch uses, may fail to reuse small freed
/// allocations, so that a process with many small calls would grow without bound.
class Scratch {
 public:
  Allocator allocator() {
    return {[this](std::size_t bytes) { return allocate(bytes); },
            [this](void* memory, std::size_t bytes) { release(static_cast<std::byte*>(memory), bytes); }};
  }

 private:
  static constexpr std::size_t kStackBytes = std::size_t{1} << 20, kAlignment = 64;

  static std::byte* stack() {
    thread_local const TorchTensor bytes = bytes_of(kStackBytes, {});
    return static_cast<std::byte*>(bytes.data_ptr());
  }

  static std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  void* allocate(std::size_t bytes) {
    if (aligned(bytes) <= kStackBytes - top_) {
      void* memory = stack() + top_;
      top_ += aligned(bytes);
      return memory;
    }
    held_.push_back(bytes_of(bytes, {}));
    return held_.back().data_ptr();
  }

  void release(std::byte* memory, std::size_t bytes) {
    if (memory >= stack() && memory < stack() + kStackBytes) {
      if (memory + aligned(bytes) == stack() + top_)
        top_ -= aligned(bytes);  // memory below the top is released with the call
      return;
    }
    const auto found = std::find_if(held_.rbegin(), held_.rend(),
                                    [&](const TorchTensor& tensor) { return tensor.data_ptr() == memory; });
    held_.erase(std::prev(found.base()));
  }

  std::size_t top_ = 0;
  std::vector<TorchTensor> held_;
};

/// A call on the CPU, whose offsets are copied.
class HostCall : public OperatorCall {
 public:
  Sequences sequences{};

  HostCall(const Routing& call_routing, const TorchTensor& q, const TorchTensor& k,
           const TorchTensor& cu_seqlens_q, const TorchTensor& cu_seqlens_k)
      : HostCall(call_routing) {
    require_device("q", q, device);
    require_device("k", k, device);
    sequences.cu_seqlens_q = offsets_of("cu_seqlens_q", cu_seqlens_q);
    sequences.cu_seqlens_k = offsets_of("cu_seqlens_k", cu_seqlens_k);
  }
  HostCall(const Routing& call_routing, const TorchTensor& q) : HostCall(call_routing) {
    require_device("q", q, device);
  }

  /// Returns the elements of a one-dimensional int32 tensor, copied for the duration of the call.
  const std::int32_t* list(const char* name, const TorchTensor& t) {
    return lists_.emplace_back(offsets_of(name, t)).data();
  }
  /// Throws ArgumentError unless every span lies within `tokens` tokens.
  static void check_spans(const std::int32_t* begins, const std::int32_t* ends, std::int64_t sequences,
                          std::int64_t tokens) {
    for (std::int64_t s = 0; s < sequences; ++s) {
      if (begins[s] < 0 || ends[s] < begins[s] || ends[s] > tokens) {
        refuse("begin, end", "expected tokens of k and v (", tokens, ") in sequence ", s, ", got ", begins[s],
               " and ", ends[s]);
      }
    }
  }
  /// Returns the longest of some lengths, which is at most `bound`.
  static std::int64_t max_length(const std::int32_t* lengths, std::int64_t count, std::int64_t bound) {
    const std::int32_t* longest = std::max_element(lengths, lengths + count);
    return count == 0 ? 0 : std::clamp<std::int64_t>(*longest, 0, bound);
  }

  /// The blocks of gate inputs, which the offsets count.
  void count_blocks(std::int64_t) {}

  /// Returns the execution on torch's threads; float64 without a backend runs on the reference, its only one.
  Execution execution(const std::string& backend, DType dtype) {
    Execution execution;
    execution.backend = backend.empty() && dtype == DType::f64 ? "reference" : backend;
    execution.parallel = torch_threads();
    execution.cancelled = [this] { return interrupt_.run_handlers(); };
    execution.scratch = scratch_.allocator();
    return execution;
  }

 private:
  explicit HostCall(const Routing& call_routing) : OperatorCall{call_routing} {}

  std::deque<std::vector<std::int32_t>> lists_{};
  Scratch scratch_{};
  Interrupt interrupt_{};
};

}  // namespace moba::pytorch
