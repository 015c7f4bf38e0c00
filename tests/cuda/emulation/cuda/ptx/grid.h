#pragma once

#include "cuda/ptx/device.h"

/// Replaces src/cuda/ptx/grid.h: grids run one after another.
namespace moba::cuda::ptx {

MOBA_DEVICE void griddepcontrol_wait() {}
MOBA_DEVICE void griddepcontrol_launch_dependents() {}

}  // namespace moba::cuda::ptx
