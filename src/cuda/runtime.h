#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/launch.h"
#include "cuda/ptx/device.h"
#include "cuda/tensor_map.h"
#include "moba/error.h"
#include "moba/execution.h"

/// The seam to CUDA's runtime: what is asked of a device, its memory, and launches, all in the order of one
/// stream and without waiting for it, so that a call can be captured into a graph. Every failure is thrown as
/// DeviceError by the function that met it, after the runtime was told to forget it.
namespace moba::cuda {

struct Hardware {
  int multiprocessors = 0;
  int capability = 0;            // 10 major + minor: 80, 90
  std::size_t shared_bytes = 0;  // that a block may have
};

/// The thread's current device.
Hardware current_hardware(std::string_view function);

/// Whether `pointer` is memory that the device can use.
bool is_on_device(const void* pointer);

/// For boxes of `rows` tokens.
TensorMap tensor_map(std::string_view function, const Tensor& t, int rows);

/// Work of one call, in order.
class Stream {
 public:
  /// `function` begins the messages of errors.
  Stream(std::string_view function, const Execution& execution)
      : function_(function), stream_(execution.stream), scratch_(&execution.scratch) {}

  std::string_view function() const { return function_; }

  /// `kernel` with `params`, by `grid` blocks of `threads` threads with `shared` bytes of dynamic shared
  /// memory. An empty grid is no launch.
  template <typename Params>
  void launch(const char* name, void (*kernel)(const Params), Grid grid, int threads, std::size_t shared,
              const Params& params) {
    if (grid.x <= 0 || grid.y <= 0) return;
    check_grid(name, grid);
    launch_kernel({function_, stream_, name, grid, threads, shared}, kernel, params);
  }

  /// Sets bytes.
  void fill(void* to, int value, std::size_t bytes);

 private:
  friend class Arena;

  void check_grid(const char* name, Grid grid) const {
    constexpr std::int64_t kMostX = 0x7FFFFFFF, kMostY = 65535;
    if (grid.x > kMostX || grid.y > kMostY) {
      throw DeviceError(function_ + ": kernel " + name + " would need " + std::to_string(grid.x) + " x " +
                        std::to_string(grid.y) + " blocks");
    }
  }
  std::byte* allocate(std::size_t bytes);
  void release(std::byte* memory, std::size_t bytes) noexcept;

  std::string function_;
  void* stream_;
  const Allocator* scratch_;
};

/// Device memory of a call: the caller's allocator's, or the stream's.
class Arena {
 public:
  Arena(Stream& stream, std::size_t bytes) : queue_(stream), bytes_(bytes), data_(stream.allocate(bytes)) {}
  ~Arena() { queue_.release(data_, bytes_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }

 private:
  Stream& queue_;
  std::size_t bytes_;
  std::byte* data_;
};

/// Deals out a arena piece by piece. Without memory it only measures, so that one function says both what a
/// group needs and where it lies.
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
