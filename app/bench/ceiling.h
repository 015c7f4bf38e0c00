#pragma once

#include "app/bench/memory.h"
#include "app/bench/row.h"

namespace moba::bench {

/// What this machine can do with these threads, the best of all measurements so far.
class Ceiling {
 public:
  /// `with_bandwidth`: reads of memory are measured too, over a buffer of 1 GiB.
  Ceiling(const Parallel& parallel, bool with_bandwidth);

  /// Arithmetic, a tenth of a second each.
  void measure_arithmetic();
  /// Reads the whole buffer, which also leaves the caches holding nothing else.
  void sweep();

  const Ceilings& best() const { return best_; }

 private:
  const Parallel& parallel_;
  Memory buffer_;
  Ceilings best_;
};

}  // namespace moba::bench
