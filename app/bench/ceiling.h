#pragma once

#include "app/bench/memory.h"
#include "app/bench/row.h"

namespace moba::bench {

/// The limits of this machine with these threads, the best of all measurements so far.
class Ceiling {
 public:
  /// `with_bf16`: the CPU's bf16 products are measured too. `with_bandwidth`: so are reads of memory, over a
  /// buffer of 1 GiB.
  Ceiling(const Parallel& parallel, bool with_bf16, bool with_bandwidth);

  /// Arithmetic, a twentieth of a second each.
  void measure_arithmetic();
  /// Reads the whole buffer, which also leaves the caches holding nothing else.
  void sweep();

  const Ceilings& best() const { return best_; }

 private:
  const Parallel& parallel_;
  bool with_bf16_;
  Memory buffer_;
  Ceilings best_;
};

}  // namespace moba::bench
