// The backend "cuda" of the tests: its tensors lie in host memory, and a Mirror copies them to the device.
#include "mirror.h"

#include <algorithm>
#include <stdexcept>

#include "backend.h"
#include "cuda/flow.h"

#ifdef MOBA_CUDA_EMULATION
#include <cstring>

#include "emulation/memory.h"
#else
#include <cuda_runtime_api.h>

#include <string>
#endif

namespace moba {
namespace test {

#ifdef MOBA_CUDA_EMULATION

void* device_allocate(std::size_t bytes) {
  return cuda::emulation::allocate(bytes);
}
void device_release(void* memory) {
  cuda::emulation::release(memory);
}
void device_transfer(void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}

#else

namespace {

void require(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

void* device_allocate(std::size_t bytes) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)), "memory for a test");
  return memory;
}
void device_release(void* memory) {
  static_cast<void>(cudaFree(memory));
}
void device_transfer(void* to, const void* from, std::size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "a copy for a test");
}

#endif

Mirror::Buffer::Buffer(std::byte* on_host, std::size_t count)
    : host(on_host),
      bytes(count),
      shift(reinterpret_cast<std::uintptr_t>(on_host) % kAlignment),
      memory(static_cast<std::byte*>(device_allocate(shift + count))) {
  device_transfer(device(), host, bytes);
}

Tensor Mirror::read(Tensor t) {
  const std::size_t bytes = size_of(t.dtype);
  std::int64_t low = 0, high = 1;
  for (std::size_t dim = 0; dim < static_cast<std::size_t>(t.rank); ++dim) {
    if (t.sizes[dim] == 0) return t;
    const std::int64_t reach = (t.sizes[dim] - 1) * t.strides[dim];
    (reach < 0 ? low : high) += reach;
  }
  if (t.data == nullptr) return t;
  auto* const first = static_cast<std::byte*>(t.data) + low * static_cast<std::int64_t>(bytes);
  const Buffer& buffer = buffers_.emplace_back(first, static_cast<std::size_t>(high - low) * bytes);
  t.data = buffer.device() - low * static_cast<std::int64_t>(bytes);
  return t;
}

Execution Mirror::context(Execution execution) {
  if (!execution.scratch.allocate) return execution;
  execution.scratch = {[this, ask = execution.scratch.allocate](std::size_t bytes) -> void* {
                         void* const theirs = ask(bytes);
                         if (theirs == nullptr) return nullptr;
                         void* const memory = device_allocate(bytes);
                         theirs_[memory] = theirs;
                         return memory;
                       },
                       [this, tell = execution.scratch.release](void* memory, std::size_t bytes) {
                         tell(theirs_.at(memory), bytes);
                         device_release(memory);
                       }};
  return execution;
}

void Mirror::copy_back() const {
  for (const Buffer& buffer : buffers_) {
    if (buffer.written) device_transfer(buffer.host, buffer.device(), buffer.bytes);
  }
}

}  // namespace test

namespace {

using test::Mirror;

DeviceBatch starts(Mirror& mirror, DeviceBatch batch) {
  if (!batch.on_device) return batch;
  batch.q_starts = mirror.read(batch.q_starts, batch.count + 1);
  batch.k_starts = mirror.read(batch.k_starts, batch.count + 1);
  return batch;
}

/// Elements of a selection; `stride` as in Outputs.
std::int64_t selected(const DeviceBatch& batch, const Routing& routing, const Tensor& q,
                      std::int64_t stride) {
  const std::int64_t blocks = batch.max_seqlen_k == 0 ? 0 : (batch.max_seqlen_k - 1) / routing.block_size + 1;
  return q.sizes[0] * q.sizes[1] * (stride == 0 ? std::min(routing.top_k, blocks) : stride);
}

/// The routing with the caller's selection on the device.
Routing route(Mirror& mirror, Routing routing, const Tensor& q) {
  Selection& s = routing.selection;
  const std::int64_t stride = s.stride == 0 ? s.width : s.stride;
  if (s.width > 0) s.blocks = mirror.read(s.blocks, s.heads * q.sizes[0] * stride);
  return routing;
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const DeviceBatch& batch,
               const Routing& routing, const Outputs& outputs, const Execution& execution) {
  Mirror mirror;
  const Outputs there{
      .out = mirror.write(outputs.out),
      .lse = mirror.write(outputs.lse, q.sizes[0] * q.sizes[1]),
      .selection = mirror.write(outputs.selection, selected(batch, routing, q, outputs.selection_stride)),
      .selection_stride = outputs.selection_stride};
  cuda::attention(mirror.read(q), mirror.read(k), mirror.read(v), starts(mirror, batch),
                  route(mirror, routing, q), there, mirror.context(execution));
  mirror.copy_back();
}

void select(const GateInputs& gate, const DeviceBatch& batch, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  Mirror mirror;
  const Outputs there{.selection = mirror.write(outputs.selection,
                                                selected(batch, routing, gate.q, outputs.selection_stride)),
                      .selection_stride = outputs.selection_stride};
  cuda::select({mirror.read(gate.q), mirror.read(gate.k)}, starts(mirror, batch), routing, there,
               mirror.context(execution));
  mirror.copy_back();
}

void features(const Tensor& k, const DeviceBatch& batch, std::int64_t block_size,
              const BlockFeatures& features, const Execution& execution) {
  Mirror mirror;
  cuda::features(mirror.read(k), starts(mirror, batch), block_size,
                 {mirror.write(features.mean), mirror.write(features.max), mirror.write(features.min)},
                 mirror.context(execution));
  mirror.copy_back();
}

void attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Saved& saved, const DeviceBatch& batch, const Routing& routing,
                        const Gradients& gradients, const Execution& execution) {
  Mirror mirror;
  const Saved forward{
      .out = mirror.read(saved.out),
      .lse = mirror.read(saved.lse, q.sizes[0] * q.sizes[1]),
      .selection = mirror.read(saved.selection, selected(batch, routing, q, saved.selection_stride)),
      .selection_stride = saved.selection_stride};
  const Gradients there{mirror.write(gradients.dq), mirror.write(gradients.dk), mirror.write(gradients.dv)};
  cuda::attention_backward(mirror.read(d_out), mirror.read(q), mirror.read(k), mirror.read(v), forward,
                           starts(mirror, batch), route(mirror, routing, q), there,
                           mirror.context(execution));
  mirror.copy_back();
}

PagedCache paged(Mirror& mirror, PagedCache cache) {
  cache.k = mirror.read(cache.k);
  cache.v = mirror.read(cache.v);
  cache.means = mirror.write(cache.means);
  cache.page_table = mirror.read(cache.page_table, cache.sequences * cache.table_stride);
  cache.lengths = mirror.read(cache.lengths, cache.sequences);
  cache.starts = mirror.read(cache.starts, cache.sequences);
  return cache;
}

void decode(const Tensor& q, const PagedCache& cache, const Routing& routing, const Outputs& outputs,
            const Execution& execution) {
  Mirror mirror;
  const PagedCache there = paged(mirror, cache);
  cuda::decode(mirror.read(q), there, route(mirror, routing, q),
               {.out = mirror.write(outputs.out), .lse = mirror.write(outputs.lse, q.sizes[0] * q.sizes[1])},
               mirror.context(execution));
  mirror.copy_back();
}

void update_means(const PagedCache& cache, std::int64_t block_size, const std::int32_t* before,
                  std::int64_t max_added, const Execution& execution) {
  Mirror mirror;
  const PagedCache there = paged(mirror, cache);
  cuda::update_means(there, block_size, mirror.read(before, cache.sequences), max_added,
                     mirror.context(execution));
  mirror.copy_back();
}

constexpr DeviceFlow kFlow{.attention = attention,
                           .select = select,
                           .features = features,
                           .attention_backward = attention_backward,
                           .decode = decode,
                           .update_means = update_means};

}  // namespace

const Backend cuda_backend{.name = "cuda", .device = &kFlow};

}  // namespace moba
