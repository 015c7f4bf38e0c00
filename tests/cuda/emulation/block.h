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

/// The same of a warpgroup: the four warps whose first is a multiple of four.
constexpr int kWarpgroupThreads = 128;
void warpgroup_collective(const char* name, void* operands, void (*body)(void* const* threads));

/// wgmma.mma_async: a product that a warpgroup begins. `body` runs over its threads' operands, which are
/// copied, at once or when the product's group is waited for, at random; products of a warpgroup in order.
void wgmma_async(const void* operands, std::size_t bytes, void (*body)(void* const* threads));
void wgmma_commit();
void wgmma_wait(int pending);

/// bar.sync and bar.arrive: passed when `threads` threads have come to barrier `id`.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

/// cp.async: 16 bytes, the first `bytes` of them from `from` and zeros behind.
void cp_async(void* to, const void* from, int bytes);
void cp_async_commit();
/// Returns when all but the newest `pending` committed groups of this thread have landed.
void cp_async_wait(int pending);

/// mbarrier: a phase ends when `arrivals` threads have arrived and all bytes that were announced have landed.
void mbarrier_init(const void* barrier, int arrivals);
void mbarrier_arrive(const void* barrier, std::int64_t announced_bytes);
/// Returns once the phase of that parity has ended; the first phase's is 0.
void mbarrier_wait(const void* barrier, unsigned parity);
/// cp.async.bulk: `land` runs some time later, and then `barrier` counts the bytes.
void tma_load(std::function<void()> land, const void* barrier, std::int64_t bytes);

/// Bulk copies and products of warpgroups reach shared memory by another way than threads do, the async
/// proxy. What a thread has written there (in pieces of 16 bytes) it must fence before others pass it on.
void wrote(const void* shared);
void fence_proxy_async();
/// Whether `shared` is shared memory that was not written without a fence behind; an error of the block if
/// not.
bool check_fenced(const void* shared);

/// Compute capability of the device that is played, 80 unless told otherwise.
int& capability();
/// Launches that succeed before one fails, as launches of a runtime may; below 0 all do.
int& launches_before_failure();
/// Counts a launch, and whether it is the one that fails.
bool launch_fails();
/// How often a kernel of that name has been launched by this thread.
int launches(const char* name);

/// Runs a kernel. Other seeds shuffle otherwise; MOBA_EMULATION_SEED sets the first.
void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& kernel);

}  // namespace moba::cuda::emulation
