#pragma once

#include "cuda/ptx/copy.h"
#include "cuda/tensor_map.h"

/// Bulk copies of sm_90 and the barriers in shared memory that they complete on. A barrier's phase ends when
/// its arrivals have come and the bytes that they announced have landed; phases alternate in parity from 0,
/// and what was written before an arrival is seen behind a wait.
namespace moba::cuda::ptx {

/// In shared memory.
struct alignas(8) Mbarrier {
  std::uint64_t state;
};

MOBA_DEVICE std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
/// By one thread, which must then `fence_proxy_async` before all meet at a barrier.
MOBA_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals)
               : "memory");
}
MOBA_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}
/// Arrives, and announces `bytes` that copies will bring.
MOBA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}
/// Waits until the phase of that parity has ended. Before the first has, that of parity 1 counts as ended.
MOBA_DEVICE void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(address_of(barrier)),
      "r"(parity)
      : "memory");
}
/// Makes what this thread has written to shared memory visible to bulk copies and products of warpgroups.
MOBA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Begins to load the map's box whose first element is [token, head, column], zeros where the tensor has
/// none, to 1024-byte aligned shared memory. All of its bytes count for `barrier`.
MOBA_DEVICE void tma_load_3d(std::byte* to, const TensorMap& map, int column, int head, int token,
                             Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], [%5];" ::"r"(address_of(to)),
      "l"(&map), "r"(column), "r"(head), "r"(token), "r"(address_of(barrier))
      : "memory");
}
/// Zeros to `offset` bytes behind `shared`.
MOBA_DEVICE void zero_vec(std::byte* shared, std::uint32_t offset) {
  *reinterpret_cast<Vec16*>(shared + offset) = {0, 0, 0, 0};
}

}  // namespace moba::cuda::ptx
