#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "moba/export.h"

namespace moba {

/// A parallel for loop. `run(tasks, body)` calls `body(task, worker)` once for every task in [0, tasks), in
/// any order, with `worker` in [0, threads) and no two concurrent calls with one worker, and returns when
/// all are done. The body never throws.
struct Parallel {
  using Body = std::function<void(std::int64_t task, int worker)>;

  int threads = 1;
  std::function<void(std::int64_t tasks, const Body& body)> run{};
};

/// OpenMP's threads; 0: as many as OpenMP would use.
MOBA_EXPORT Parallel openmp(int threads = 0);
/// Plain std::thread, started for each call: for ThreadSanitizer, which cannot see through OpenMP, and for
/// hosts without it.
MOBA_EXPORT Parallel std_threads(int threads);
/// The calling thread alone.
MOBA_EXPORT Parallel serial();

/// The source of scratch memory, aligned to 64 bytes. Both or neither must be set; the default is the C++
/// heap.
struct Allocator {
  std::function<void*(std::size_t bytes)> allocate{};
  std::function<void(void* memory, std::size_t bytes)> release{};
};

/// Seconds spent in each stage, summed over slices, and the peak of scratch memory in bytes. On CUDA
/// the latter alone: reading a clock would make the host wait for the device.
struct Profile {
  double centroids = 0, gate = 0, plan = 0, attend = 0;
  std::size_t workspace_bytes = 0;
};

/// Settings of a call that do not change its result. All have defaults.
struct Execution {
  /// "reference", "cpu" or "cuda"; empty: the environment's MOBA_BACKEND, else the best that is built for the
  /// device.
  std::string backend{};
  /// Unset: OpenMP.
  Parallel parallel{};
  Allocator scratch{};
  /// Scratch memory is kept below this many bytes; long inputs with many heads are then processed in
  /// slices. Unset: 256 MiB, on CUDA 512 MiB.
  std::optional<std::size_t> workspace_bytes{};
  /// Returns true to end the call early: it then throws Cancelled. Asked every few milliseconds by any thread
  /// of the call, and not again after true. Ignored by `append`, which is short, and on CUDA.
  std::function<bool()> cancelled{};
  /// The CUDA stream, as a cudaStream_t.
  void* stream = nullptr;
  /// Receives the cost of the call, added to what it holds; may be null.
  Profile* profile = nullptr;
};

}  // namespace moba
