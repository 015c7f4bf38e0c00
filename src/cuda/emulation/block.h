#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

/// A device on the host, for tests: kernels are compiled as plain C++ and their threads are fibers, which
/// meet where the hardware's threads meet. One block runs after another, in a shuffled order. Mistakes that
/// hardware answers with wrong numbers or a hang are thrown as std::logic_error: lanes of a warp at different
/// instructions, barriers that can never be passed. Shared memory begins as NaN, and an asynchronous copy
/// lands when it is issued or when it is waited for, at random, so that a missing wait shows in both
/// directions.
namespace moba::cuda::emulation {

constexpr int kLanes = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

/// Where the running thread is.
struct Place {
  Dim block{}, grid{};
  int thread = 0, threads = 0;
  std::byte* shared = nullptr;
};

const Place& here();

/// An instruction that a warp executes together. Every lane calls with its own operands; when all have come,
/// `body` runs once over the 32 of them.
void collective(const char* name, void* operands, void (*body)(void* const* lanes));

/// bar.sync and bar.arrive: passed when `threads` threads have come to barrier `id`.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

/// cp.async: 16 bytes, the first `bytes` of them from `from` and zeros behind.
void copy_async(void* to, const void* from, int bytes);
void copy_async_commit();
/// Returns when all but the newest `pending` committed groups of this thread have landed.
void copy_async_wait(int pending);

/// Runs a kernel. Other seeds shuffle otherwise; MOBA_EMULATION_SEED sets the first.
void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& kernel);

}  // namespace moba::cuda::emulation
