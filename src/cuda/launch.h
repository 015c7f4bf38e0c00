#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace moba::cuda {

struct Grid {
  std::int64_t x = 1, y = 1;
};

/// A launch of a kernel by `grid` blocks of `threads` threads with `shared` bytes of dynamic shared memory.
struct Launch {
  void* stream;
  const char* name;
  Grid grid;
  int threads;
  std::size_t shared;
  bool is_dependent = false;  // may start before the previous kernel has ended
};

void launch_kernel(const Launch& launch, const void* kernel, void** arguments);

template <typename Params>
void launch_kernel(const Launch& launch, void (*kernel)(const Params), Params params) {
  void* arguments[] = {&params};
  launch_kernel(launch, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace moba::cuda
