#pragma once

#include "cuda/ptx/device.h"

/// Programmatic dependent launch (sm_90): a grid launched by `Stream::launch_dependent` starts once all
/// blocks of the previous one have allowed it or ended.
namespace moba::cuda::ptx {

/// Waits until the previous grid has ended and its writes are visible. Returns at once in other launches.
MOBA_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Allows the next grid to start.
MOBA_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace moba::cuda::ptx
