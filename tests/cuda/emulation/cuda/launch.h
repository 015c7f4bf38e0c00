#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulation/block.h"
#include "errors.h"

namespace moba::cuda {

struct Grid {
  std::int64_t x = 1, y = 1;
};

/// Replaces src/cuda/launch.h: a launch returns after the kernel has ended.
struct Launch {
  void* stream;
  const char* name;
  Grid grid;
  int threads;
  std::size_t shared;
  bool is_dependent = false;
};

template <typename Params>
void launch_kernel(const Launch& launch, void (*kernel)(const Params), const Params& params) {
  if (emulation::launch_fails()) {
    throw DeviceFailure{std::string("kernel ") + launch.name + " cannot be launched: a test wants it so"};
  }
  emulation::run(launch.name, {static_cast<unsigned>(launch.grid.x), static_cast<unsigned>(launch.grid.y)},
                 launch.threads, launch.shared, [&] { kernel(params); });
}

}  // namespace moba::cuda
