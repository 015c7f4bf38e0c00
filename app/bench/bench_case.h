#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "app/bench/ceiling.h"
#include "app/bench/row.h"

namespace moba::bench {

struct Checked {
  std::int64_t rows = 0, ties = 0;
  Work work;
  /// Times of the compared run: as `run` would have returned it, and as measured, which is less for a
  /// sample.
  double seconds = 0, wall_seconds = 0;
  Profile stages;
};

/// One variant of block size and top-k, to be run repeatedly on the data of its setting.
class BenchCase {
 public:
  virtual ~BenchCase() = default;
  /// Runs once over poisoned outputs, compares sampled rows with the reference backend and counts the work.
  /// Throws llm::DataError that names the row where the results differ.
  virtual Checked check() = 0;
  /// Runs once; returns the seconds that count and adds up those of the stages.
  virtual double run(Profile& stages) = 0;
  /// Parts of the outputs, which every run must give the same values.
  virtual std::vector<std::span<std::byte>> sample() = 0;
};

/// Makes the data and one case per variant. `ceiling` serves to empty the caches before decoded tokens.
std::vector<std::unique_ptr<BenchCase>> make_bench_cases(const Setting& setting,
                                                         const std::vector<Variant>& variants,
                                                         const Conditions& conditions,
                                                         const Parallel& parallel, Ceiling& ceiling);

/// The minimum memory that the cases take, scratch included.
double needed_bytes(const Setting& setting, const std::vector<Variant>& variants,
                    const Conditions& conditions);

}  // namespace moba::bench
