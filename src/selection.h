#pragma once

#include "call.h"

/// Conversions between the gate's selection, where a causal query's own block is not listed, and the public
/// list [Hq, Tq, selection_width()], which lists it.
namespace moba {

/// Writes the slice's rows of the public list.
void write_selection(const Call& call, const Selection& selection, std::int32_t* out);
/// Throws ArgumentError unless every row of a public list is one that the gate could have written. Null and
/// dense attention have nothing to check.
void check_saved_selection(const Call& call, const std::int32_t* saved);
/// Reads the slice's rows of a public list that check_saved_selection has accepted.
Selection read_selection(const Call& call, const WorkSlice& slice, const std::int32_t* saved,
                         Scratch& scratch);

}  // namespace moba
