#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>

#include "cuda/attend.h"

namespace moba::cuda {
namespace {

constexpr int kLeastCapability = 80;
constexpr std::int64_t kMostHeads = 65535;  // a grid's second dimension
constexpr std::int64_t kRowAlignment = 16;  // bytes that a thread moves at once

[[noreturn]] void refuse(std::string_view function, std::string_view argument, const std::string& message) {
  throw Error(std::string(function) + ": " + std::string(argument) + ": expected " + message);
}

void check_device(std::string_view function, std::int64_t head_dim) {
  const Hardware device = current_hardware(function);
  if (device.capability < kLeastCapability) {
    refuse(function, "backend",
           "a device of compute capability 8.0 or newer for cuda, got " +
               std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10));
  }
  check_shared(function, head_dim, attend_shared_bytes(head_dim));
}

void check_supported(std::string_view function, const Tensor& q, const Tensor& k) {
  if (q.dtype != DType::bf16 && q.dtype != DType::f16)
    refuse(function, "q", std::string("bf16 or f16 (backend cuda), got ") + name_of(q.dtype));
  constexpr std::array<std::int64_t, 4> kHeadDims{64, 96, 128, 256};
  if (std::find(kHeadDims.begin(), kHeadDims.end(), q.sizes[2]) == kHeadDims.end())
    refuse(function, "q", "head_dim 64, 96, 128 or 256 (backend cuda), got " + std::to_string(q.sizes[2]));
  if (q.sizes[1] > kMostHeads)
    refuse(
        function, "q",
        "at most " + std::to_string(kMostHeads) + " heads (backend cuda), got " + std::to_string(q.sizes[1]));
  constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();
  for (const auto& [name, t] : {std::pair{"q", &q}, std::pair{"k", &k}}) {
    if (t->sizes[0] > kMostTokens) {
      refuse(function, name,
             "at most " + std::to_string(kMostTokens) + " tokens (backend cuda), got " +
                 std::to_string(t->sizes[0]));
    }
  }
}

}  // namespace

void check_shared(std::string_view function, std::int64_t head_dim, std::size_t bytes) {
  const Hardware device = current_hardware(function);
  if (device.shared_bytes < bytes) {
    refuse(function, "backend",
           "a device with " + std::to_string(bytes) +
               " bytes of shared memory a block for cuda with head_dim " + std::to_string(head_dim) +
               ", got one with " + std::to_string(device.shared_bytes));
  }
}

void check_view(std::string_view function, const char* name, const Tensor& t) {
  if (t.device != Device::cuda) refuse(function, name, "a CUDA tensor (backend cuda), got one on the CPU");
  if (t.sizes[0] == 0) return;
  if (!is_on_device(t.data)) refuse(function, name, "device memory, got a host pointer");
  const auto bytes = static_cast<std::int64_t>(size_of(t.dtype));
  if (reinterpret_cast<std::uintptr_t>(t.data) % kRowAlignment != 0 ||
      t.strides[0] * bytes % kRowAlignment != 0 || t.strides[1] * bytes % kRowAlignment != 0) {
    refuse(function, name,
           "rows aligned to " + std::to_string(kRowAlignment) + " bytes, got an address " +
               std::to_string(reinterpret_cast<std::uintptr_t>(t.data) % kRowAlignment) +
               " past that and strides of " + std::to_string(t.strides[0]) + " and " +
               std::to_string(t.strides[1]) + " elements");
  }
}

void check_list(std::string_view function, const char* name, const void* list) {
  if (list != nullptr && !is_on_device(list)) refuse(function, name, "device memory, got a host pointer");
}

Task make_task(std::string_view function, const Tensor& q, const Tensor& k, const Tensor& v,
               const DeviceBatch& batch, const Routing& routing) {
  check_view(function, "q", q);
  check_view(function, "k", k);
  check_view(function, "v", v);
  check_supported(function, q, k);
  check_device(function, q.sizes[2]);
  if (batch.on_device) {
    check_list(function, "cu_seqlens_q", batch.q_starts);
    check_list(function, "cu_seqlens_k", batch.k_starts);
  }

  Task task{.q = q,
            .k = k,
            .v = v,
            .routing = routing,
            .requested_block_size = routing.block_size,
            .sequences = batch.count,
            .max_seqlen_k = std::max<std::int64_t>(batch.max_seqlen_k, 1),
            .tokens = q.sizes[0],
            .keys = k.sizes[0],
            .q_heads = q.sizes[1],
            .kv_heads = k.sizes[1],
            .group = q.sizes[1] / k.sizes[1],
            .head_dim = q.sizes[2]};
  task.scale = routing.scale.value_or(1 / std::sqrt(static_cast<float>(task.head_dim)));
  const std::int64_t blocks = (task.max_seqlen_k - 1) / routing.block_size + 1;
  task.public_width = batch.max_seqlen_k == 0 ? 0 : std::min(routing.top_k, blocks);
  if (routing.top_k >= blocks) {
    task.is_dense = true;
    task.routing.block_size = task.max_seqlen_k;
    task.routing.top_k = 1;
    task.routing.sink_blocks = 0;
    task.routing.own_block = false;
  } else {
    task.width = task.public_width - (routing.causal ? 1 : 0);
  }
  return task;
}

bool slots_are_countable(const Task& task, const WorkSlice& part) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  return task.rows(part) <= kMost / std::max<std::int64_t>(task.ranks(), 1);
}

}  // namespace moba::cuda
