#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "moba/execution.h"

namespace moba {
namespace {

/// Returns whether this process was forked from one that had called before. OpenMP's threads do not survive a
/// fork, and GNU's runtime would wait for them forever.
bool is_forked() {
  static std::atomic<bool> forked{false};
  [[maybe_unused]] static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  return forked.load(std::memory_order_relaxed);
}

}  // namespace

Parallel serial() {
  return {1, [](std::int64_t tasks, const Parallel::Body& body) {
            for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
          }};
}

Parallel openmp(int threads) {
  const int count = threads > 0 ? threads : omp_get_max_threads();
#ifdef __SANITIZE_THREAD__
  return std_threads(count);  // ThreadSanitizer takes what OpenMP's runtime orders for races
#endif
  return {count, [count](std::int64_t tasks, const Parallel::Body& body) {
            if (tasks <= 1 || count == 1) return serial().run(tasks, body);
            if (is_forked()) return std_threads(count).run(tasks, body);
#pragma omp parallel for schedule(dynamic, 1) num_threads(count)
            for (std::int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
          }};
}

Parallel std_threads(int threads) {
  const int count = std::max(threads, 1);
  return {count, [count](std::int64_t tasks, const Parallel::Body& body) {
            std::atomic<std::int64_t> next{0};
            const auto work = [&](int worker) {
              for (std::int64_t task = next++; task < tasks; task = next++) body(task, worker);
            };
            std::vector<std::thread> others;
            for (int worker = 1; worker < std::min<std::int64_t>(count, tasks); ++worker)
              others.emplace_back(work, worker);
            work(0);
            for (std::thread& other : others) other.join();
          }};
}

}  // namespace moba
