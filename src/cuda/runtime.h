#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx/device.h"
#include "cuda/tensor_map.h"
#include "errors.h"
#include "moba/execution.h"

/// Interface to the CUDA runtime: device properties, memory and launches, all in the order of one stream and
/// without synchronisation, so that a call can be captured into a graph. A failure is thrown as
/// DeviceFailure, after the runtime's last error has been cleared.
namespace moba::cuda {

struct Hardware {
  int multiprocessors = 0;
  int capability = 0;            // 10 major + minor: 80, 90
  std::size_t shared_bytes = 0;  // that a block may have
};

/// The thread's current device.
Hardware current_hardware();

/// Returns whether `pointer` is memory that the device can use.
bool is_on_device(const void* pointer);

/// Encodes a tensor map with boxes of `rows` tokens.
TensorMap tensor_map(const Tensor& t, int rows);

/// The stream of one call.
class Stream {
 public:
  explicit Stream(const Execution& execution) : stream_(execution.stream), scratch_(&execution.scratch) {}

  /// Launches `kernel` with `params` in `grid` blocks of `threads` threads with `shared` bytes of dynamic
  /// shared memory. An empty grid is no launch.
  template <typename Params>
  void launch(const char* name, void (*kernel)(const Params), Grid grid, int threads, std::size_t shared,
              const Params& params) {
    launch_if_any({stream_, name, grid, threads, shared}, kernel, params);
  }
  /// The same for a kernel that calls griddepcontrol_wait before it reads what the previous kernel writes, or
  /// writes what that one reads: it may start before the previous one has ended.
  template <typename Params>
  void launch_dependent(const char* name, void (*kernel)(const Params), Grid grid, int threads,
                        std::size_t shared, const Params& params) {
    launch_if_any({stream_, name, grid, threads, shared, true}, kernel, params);
  }

  /// Sets `bytes` bytes to `value`.
  void fill(void* to, int value, std::size_t bytes);

 private:
  friend class Arena;

  template <typename Params>
  void launch_if_any(const Launch& launch, void (*kernel)(const Params), const Params& params) {
    if (launch.grid.x <= 0 || launch.grid.y <= 0) return;
    check_grid(launch.name, launch.grid);
    launch_kernel(launch, kernel, params);
  }
  void check_grid(const char* name, Grid grid) const {
    constexpr std::int64_t kMaxX = 0x7FFFFFFF, kMaxY = 65535;
    if (grid.x > kMaxX || grid.y > kMaxY) {
      throw DeviceFailure{std::string("kernel ") + name + " would need " + std::to_string(grid.x) + " x " +
                          std::to_string(grid.y) + " blocks"};
    }
  }
  std::byte* allocate(std::size_t bytes);
  void release(std::byte* memory, std::size_t bytes) noexcept;

  void* stream_;
  const Allocator* scratch_;
};

/// Device memory of a call: the caller's allocator's, or the stream's.
class Arena {
 public:
  Arena(Stream& stream, std::size_t bytes) : stream_(stream), bytes_(bytes), data_(stream.allocate(bytes)) {}
  ~Arena() { stream_.release(data_, bytes_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }

 private:
  Stream& stream_;
  std::size_t bytes_;
  std::byte* data_;
};

/// Assigns parts of an arena. Without memory it only measures, so one function gives both the size and the
/// layout of a slice.
class ArenaLayout {
 public:
  static constexpr std::size_t kAlignment = 256;

  explicit ArenaLayout(std::byte* memory = nullptr) : memory_(memory) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* here = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return here;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* memory_;
  std::size_t used_ = 0;
};

}  // namespace moba::cuda
