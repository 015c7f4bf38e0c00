#pragma once

#include <functional>

#include "app/bench/bench_case.h"
#include "app/bench/inputs.h"

namespace moba::bench {

/// Compares [rows, heads, head_dim] with the reference's; an element may be off by `tolerance` times
/// the largest of them all. `first_row` is the number of the first row in the sequence. Throws llm::DataError
/// naming `what` and the row. Rows for which `skip` holds are left out.
void compare_rows(const char* what, const Tensor& found, const Tensor& expected, std::int64_t first_row,
                  double tolerance,
                  const std::function<bool(std::int64_t row, std::int64_t head)>& skip = {});

/// The tolerance of compare_rows for results in a storage type: rounding of the result and of what the fast
/// path rounds on the way.
double output_tolerance(DType dtype);
double gradient_tolerance(DType dtype);

/// Returns whether the blocks of a probe's row differ from the reference's by nothing but ties within
/// rounding. Throws llm::DataError where they differ by more.
bool tied(const Inputs& inputs, const Variant& variant, const Blocks& found, const Blocks& expected,
          std::int64_t head, std::int64_t row);

/// Compares the probes that lie in the slice of `blocks` with the reference: selection always, `out`
/// [queries, heads, head_dim] where it is given. Adds up rows and ties.
void check_probes(const Inputs& inputs, const Variant& variant, const Blocks& blocks, const Tensor* out,
                  Checked& checked);

}  // namespace moba::bench
