#pragma once

#include "cuda/ptx/copy.h"
#include "cuda/tensor_map.h"

/// mbarrier and TMA of sm_90. A phase of an mbarrier completes when its arrivals and the announced bytes
/// have arrived; phases alternate in parity from 0. Writes before an arrive are visible after the wait.
namespace moba::cuda::ptx {

/// mbarrier object in shared memory.
struct alignas(8) Mbarrier {
  std::uint64_t state;
};

MOBA_DEVICE std::uint32_t address_of(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}
/// Initialises the barrier. Called by one thread, which must then `fence_proxy_async` before a barrier of
/// the block.
MOBA_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals)
               : "memory");
}
MOBA_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}
/// Arrives and adds `bytes` to the transaction count of the phase.
MOBA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}
/// Waits until the phase of that parity has completed. Before the first phase has, parity 1 counts as
/// completed.
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
/// Makes writes of this thread to shared memory visible to the async proxy (TMA and wgmma).
MOBA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/// Issues the load of the box of `map` whose first element is [token, head, column] to 1024-byte aligned
/// shared memory; zeros outside the tensor. All of its bytes complete on `barrier`.
MOBA_DEVICE void tma_load_3d(std::byte* to, const TensorMap& map, int column, int head, int token,
                             Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4}], [%5];" ::"r"(address_of(to)),
      "l"(&map), "r"(column), "r"(head), "r"(token), "r"(address_of(barrier))
      : "memory");
}

}  // namespace moba::cuda::ptx
