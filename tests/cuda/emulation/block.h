#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

/// Emulation of a device on the host, for tests: kernels are compiled as plain C++ and their threads are
/// fibers, which synchronise where the threads of the hardware do. One block runs after another, in a
/// shuffled order. Mistakes that hardware turns into wrong results or a hang are thrown as std::logic_error:
/// lanes of a warp at different instructions, barriers that cannot open. Shared memory begins as NaN, and an
/// asynchronous copy completes when it is issued or when it is waited for, at random, so that a missing wait
/// is detected before and after the copy.
namespace moba::cuda::emulation {

constexpr int kLanes = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

/// Position of the running thread.
struct Place {
  Dim block{}, grid{};
  int thread = 0, threads = 0;
  std::byte* shared = nullptr;
};

const Place& here();

/// Executes an instruction of a warp. Every lane calls with its own operands; once all have, `body` runs
/// once over all 32.
void collective(const char* name, void* operands, void (*body)(void* const* lanes));

/// Executes an instruction of a warpgroup: the four warps whose first is a multiple of four.
constexpr int kWarpgroupThreads = 128;
void warpgroup_collective(const char* name, void* operands, void (*body)(void* const* threads));

/// wgmma.mma_async: `body` runs over copies of the operands of the threads, at once or when the group is
/// waited for, at random; products of a warpgroup run in order.
void wgmma_async(const void* operands, std::size_t bytes, void (*body)(void* const* threads));
void wgmma_commit();
void wgmma_wait(int pending);

/// bar.sync and bar.arrive: barrier `id` opens once `threads` threads have arrived.
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

/// cp.async: copies 16 bytes, the first `bytes` of them from `from`, then zeros.
void cp_async(void* to, const void* from, int bytes);
void cp_async_commit();
/// Returns once all but the newest `pending` committed groups of this thread have completed.
void cp_async_wait(int pending);

/// mbarrier: a phase completes once `arrivals` threads have arrived and all announced bytes have.
void mbarrier_init(const void* barrier, int arrivals);
void mbarrier_arrive(const void* barrier, std::int64_t announced_bytes);
/// Returns once the phase of that parity has completed; the parity of the first is 0.
void mbarrier_wait(const void* barrier, unsigned parity);
/// cp.async.bulk: `land` runs some time later; then `barrier` counts the bytes.
void tma_load(std::function<void()> land, const void* barrier, std::int64_t bytes);

/// TMA and wgmma access shared memory through the async proxy. A thread must fence what it has written there
/// (in units of 16 bytes) before the barrier that publishes it.
void wrote(const void* shared);
void fence_proxy_async();
/// Checks that `shared` is shared memory without unfenced writes; otherwise the block fails.
bool check_fenced(const void* shared);

/// Compute capability of the emulated device, 80 by default.
int& capability();
/// Number of launches that succeed before one fails; if negative, none fails.
int& launches_before_failure();
/// Counts a launch; returns true for the one that fails.
bool launch_fails();
/// Returns the number of launches of the kernel of that name by this thread.
int launches(const char* name);

/// Runs a kernel. MOBA_EMULATION_SEED seeds the order of blocks and warps.
void run(const char* name, Dim grid, int threads, std::size_t shared_bytes,
         const std::function<void()>& kernel);

}  // namespace moba::cuda::emulation
