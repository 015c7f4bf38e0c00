#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <string>

#include "cuda/architectures.h"
#include "cuda/attend.h"
#include "errors.h"
#include "split.h"

namespace moba::cuda {
namespace {

constexpr std::int64_t kMaxHeads = 65535;   // a grid's second dimension
constexpr std::int64_t kRowAlignment = 16;  // bytes that a thread moves at once

void check_device(std::int64_t head_dim) {
  const Hardware device = current_hardware();
  if (!any_runs_on(built_architectures(), device.capability)) {
    refuse("backend", "expected a device that the kernels of cuda are compiled for (", built_architectures(),
           "), got compute capability ", device.capability / 10, ".", device.capability % 10);
  }
  check_shared(head_dim, attend_shared_bytes(head_dim));
}

void check_supported(const Tensor& q, const Tensor& k) {
  if (q.dtype != DType::bf16 && q.dtype != DType::f16)
    refuse("q", "expected bf16 or f16 (backend cuda), got ", name_of(q.dtype));
  constexpr std::array<std::int64_t, 4> kHeadDims{64, 96, 128, 256};
  if (std::find(kHeadDims.begin(), kHeadDims.end(), q.sizes[2]) == kHeadDims.end())
    refuse("q", "expected head_dim 64, 96, 128 or 256 (backend cuda), got " + std::to_string(q.sizes[2]));
  if (q.sizes[1] > kMaxHeads)
    refuse("q", "expected at most " + std::to_string(kMaxHeads) + " heads (backend cuda), got " +
                    std::to_string(q.sizes[1]));
  constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();
  for (const auto& [name, t] : {std::pair{"q", &q}, std::pair{"k", &k}}) {
    if (t->sizes[0] > kMaxTokens) {
      refuse(name, "expected at most " + std::to_string(kMaxTokens) + " tokens (backend cuda), got " +
                       std::to_string(t->sizes[0]));
    }
  }
}

}  // namespace

void check_shared(std::int64_t head_dim, std::size_t bytes) {
  const Hardware device = current_hardware();
  if (device.shared_bytes < bytes) {
    refuse("backend", "expected a device with " + std::to_string(bytes) +
                          " bytes of shared memory a block for cuda with head_dim " +
                          std::to_string(head_dim) + ", got one with " + std::to_string(device.shared_bytes));
  }
}

void check_view(const char* name, const Tensor& t) {
  if (t.device != Device::cuda) refuse(name, "expected a CUDA tensor (backend cuda), got one on the CPU");
  if (t.sizes[0] == 0) return;
  if (!is_on_device(t.data)) refuse(name, "expected device memory, got a host pointer");
  const auto bytes = static_cast<std::int64_t>(size_of(t.dtype));
  if (reinterpret_cast<std::uintptr_t>(t.data) % kRowAlignment != 0 ||
      t.strides[0] * bytes % kRowAlignment != 0 || t.strides[1] * bytes % kRowAlignment != 0) {
    refuse(name, "expected rows aligned to " + std::to_string(kRowAlignment) + " bytes, got an address " +
                     std::to_string(reinterpret_cast<std::uintptr_t>(t.data) % kRowAlignment) +
                     " past that and strides of " + std::to_string(t.strides[0]) + " and " +
                     std::to_string(t.strides[1]) + " elements");
  }
}

void check_list(const char* name, const void* list) {
  if (list != nullptr && !is_on_device(list)) refuse(name, "expected device memory, got a host pointer");
}

DeviceCall make_call(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
                     const Routing& routing) {
  check_view("q", q);
  check_view("k", k);
  check_view("v", v);
  check_supported(q, k);
  check_device(q.sizes[2]);
  if (routing.selection.width > 0 && q.sizes[0] > 0) check_list("selection.blocks", routing.selection.blocks);
  if (batch.on_device) {
    check_list("cu_seqlens_q", batch.q_starts);
    check_list("cu_seqlens_k", batch.k_starts);
  }

  DeviceCall call;
  static_cast<CallShape&>(call) = shape_of(q, k.sizes[1], batch.max_seqlen_k, routing);
  call.max_seqlen_k = std::max<std::int64_t>(call.max_seqlen_k, 1);
  call.q = q;
  call.k = k;
  call.v = v;
  call.sequences = batch.count;
  call.keys = k.sizes[0];
  return call;
}

bool slots_are_countable(const DeviceCall& call, const WorkSlice& slice) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  return call.rows(slice) <= kMax / std::max<std::int64_t>(call.ranks(), 1);
}

std::vector<WorkSlice> slices_of(const DeviceCall& call, const Execution& execution,
                                 const std::function<std::size_t(const WorkSlice&)>& bytes) {
  return split_within(execution.workspace_bytes.value_or(kWorkspace), call.kv_heads, call.tokens, bytes,
                      [&](const WorkSlice& slice) { return slots_are_countable(call, slice); });
}

}  // namespace moba::cuda
