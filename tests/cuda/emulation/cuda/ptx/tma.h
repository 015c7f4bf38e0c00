#pragma once

#include <cstring>

#include "cuda/ptx/copy.h"
#include "cuda/tensor_map.h"

/// Replaces src/cuda/ptx/tma.h: mbarriers and TMA of the emulated block.
namespace moba::cuda::ptx {

struct alignas(8) Mbarrier {
  std::uint64_t state;
};

MOBA_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  emulation::mbarrier_init(barrier, arrivals);
}
MOBA_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  emulation::mbarrier_arrive(barrier, 0);
}
MOBA_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, std::uint32_t bytes) {
  emulation::mbarrier_arrive(barrier, bytes);
}
MOBA_DEVICE void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  emulation::mbarrier_wait(barrier, parity);
}
MOBA_DEVICE void fence_proxy_async() {
  emulation::fence_proxy_async();
}
MOBA_DEVICE void tma_load_3d(std::byte* to, const TensorMap& map, int column, int head, int token,
                             Mbarrier* barrier) {
  constexpr int kVecs = TensorMap::kColumns / 8;
  const auto land = [=, &map] {
    for (int i = 0; i < map.rows * kVecs; ++i) {
      const int row = i / kVecs, vec = i % kVecs;
      std::byte* at = to + row * 128 + (vec ^ row % 8) * 16;
      if (!emulation::check_fenced(at)) return;
      const bool exists = token + row < map.sizes[0];
      const std::byte* from =
          map.data + (token + row) * map.strides[0] + head * map.strides[1] + 2 * (column + 8 * vec);
      std::memset(at, 0, 16);
      if (exists) std::memcpy(at, from, 16);
    }
  };
  emulation::tma_load(land, barrier, map.rows * 128);
}

}  // namespace moba::cuda::ptx
