#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"

/// A second implementation of the specification, dense and direct, which shares no code with the library but
/// the number formats.
namespace moba::test {

/// Attention given a selection: [Hq, Tq, D] and [Hq, Tq].
template <typename Real>
struct Attended {
  std::vector<Real> out, lse;
};

/// Computes softmax attention over the keys of the selected blocks, with all sums in `Real`. In float it
/// rounds as frameworks do: weights are rounded to the storage type before the product with the values.
template <typename Real>
Attended<Real> attend_densely(const Case& c, const Result& selected);

/// Fails the test unless every row's blocks have the highest scores, up to the rounding of scores. Returns
/// the number of blocks that differ from the exact ones.
std::int64_t check_selection(const Case& c, const Result& result);

/// Fails the test unless out and lse are those of the selected blocks: error at most twice that of a
/// framework's dense attention. An `exact` backend may round once and no more; one that keeps partial results
/// in the storage type may round those too.
enum class Rounding { exact, fast, partial };
void check_attended(const Case& c, const Result& result, Rounding rounding);
inline void check_attended(const Case& c, const Result& result, bool exact) {
  check_attended(c, result, exact ? Rounding::exact : Rounding::fast);
}

/// Checks both of the above, and that nothing else was written.
std::int64_t check_result(const Case& c, const Result& result, Rounding rounding);
inline std::int64_t check_result(const Case& c, const Result& result, bool exact) {
  return check_result(c, result, exact ? Rounding::exact : Rounding::fast);
}

}  // namespace moba::test
