// The machine's limits, measured with nothing else in the way: independent chains of multiply-adds in
// registers, and a sum over memory.
#include "app/bench/ceiling.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "app/bench/bf16_peak.h"
#include "src/stopwatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "app/bench/ceiling.cpp"
#include <hwy/foreach_target.h>
// foreach_target first
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace moba::bench::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

/// Chains enough to hide the latency of a multiply-add on two ports, few enough to stay in registers.
#if HWY_TARGET <= HWY_AVX3 || HWY_TARGET == HWY_NEON
constexpr std::size_t kChains = 24;
#else
constexpr std::size_t kChains = 12;
#endif

}  // namespace

/// Does `rounds` rounds of multiply-adds; returns how many floating-point operations that was. `sink` keeps
/// the compiler from leaving them out.
double multiply_add(std::int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto by = hn::Set(d, 0.999F), plus = hn::Set(d, 0.001F);
  hn::Vec<decltype(d)> chain[kChains];
#pragma GCC unroll 24
  for (std::size_t i = 0; i < kChains; ++i) chain[i] = hn::Set(d, static_cast<float>(i));
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (std::size_t i = 0; i < kChains; ++i) chain[i] = hn::MulAdd(chain[i], by, plus);
  }
  auto sum = hn::Zero(d);
#pragma GCC unroll 24
  for (std::size_t i = 0; i < kChains; ++i) sum = hn::Add(sum, chain[i]);
  *sink = hn::GetLane(sum);
  return 2.0 * static_cast<double>(rounds) * kChains * static_cast<double>(hn::Lanes(d));
}

/// Sum of `count` floats, a multiple of 1024.
float sum_of(const float* HWY_RESTRICT from, std::size_t count) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  constexpr std::size_t kSums = 8;
  hn::Vec<decltype(d)> sum[kSums];
  for (auto& each : sum) each = hn::Zero(d);
  for (std::size_t i = 0; i < count; i += kSums * lanes) {
#pragma GCC unroll 8
    for (std::size_t j = 0; j < kSums; ++j) sum[j] = hn::Add(sum[j], hn::Load(d, from + i + j * lanes));
  }
  for (std::size_t j = 1; j < kSums; ++j) sum[0] = hn::Add(sum[0], sum[j]);
  return hn::GetLane(hn::SumOfLanes(d, sum[0]));
}

}  // namespace moba::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moba::bench {
namespace {

HWY_EXPORT(multiply_add);
HWY_EXPORT(sum_of);

constexpr std::size_t kBuffer = std::size_t{1} << 30, kSlice = std::size_t{4} << 20;
/// Work comes in small tasks, so that a thread that starts late costs little.
constexpr std::int64_t kTasksPerThread = 32, kTaskRounds = 20000;
constexpr double kSeconds = 0.05;

/// `task(sink)` does some operations and returns how many; the result is the best rate of all threads in
/// GFLOP/s, over about kSeconds.
double best_rate(const Parallel& parallel, const auto& task) {
  double best = 0, spent = 0;
  while (spent < kSeconds) {
    std::atomic<std::int64_t> done{0};
    const double seconds = seconds_of([&] {
      parallel.run(kTasksPerThread * parallel.threads, [&](std::int64_t, int) {
        float sink = 0;
        done += static_cast<std::int64_t>(task(&sink));
        [[maybe_unused]] volatile float kept = sink;
      });
    });
    best = std::max(best, static_cast<double>(done.load()) / seconds / 1e9);
    spent += seconds;
  }
  return best;
}

}  // namespace

Ceiling::Ceiling(const Parallel& parallel, bool with_bf16, bool with_bandwidth)
    : parallel_(parallel), with_bf16_(with_bf16) {
  if (with_bandwidth) {
    buffer_ = Memory(kBuffer);
    std::memset(buffer_.data(), 0, kBuffer);
  }
}

void Ceiling::measure_arithmetic() {
  const double fma =
      best_rate(parallel_, [](float* sink) { return HWY_DYNAMIC_DISPATCH(multiply_add)(kTaskRounds, sink); });
  best_.fma_gflops = std::max(best_.fma_gflops, fma);
  if (const Bf16Peak* bf16 = with_bf16_ ? bf16_peak() : nullptr) {
    best_.bf16_name = bf16->name;
    best_.bf16_gflops =
        std::max(best_.bf16_gflops,
                 best_rate(parallel_, [&](float* sink) { return bf16->multiply(kTaskRounds, sink); }));
  }
}

void Ceiling::sweep() {
  const double seconds = seconds_of([&] {
    parallel_.run(static_cast<std::int64_t>(kBuffer / kSlice), [&](std::int64_t slice, int) {
      const auto* from =
          reinterpret_cast<const float*>(buffer_.data() + static_cast<std::size_t>(slice) * kSlice);
      [[maybe_unused]] volatile float kept = HWY_DYNAMIC_DISPATCH(sum_of)(from, kSlice / sizeof(float));
    });
  });
  best_.read_gb_per_s = std::max(best_.read_gb_per_s, static_cast<double>(kBuffer) / seconds / 1e9);
}

}  // namespace moba::bench
#endif
