#pragma once

#include "call.h"

/// The selection in its one form, from the gate to the backward pass: Outputs::selection.
namespace moba {

/// The caller's rows, of all heads and tokens.
SelectionRows rows_in(const Outputs& outputs, const CallShape& call);
/// The same; they are only read.
SelectionRows rows_in(const Saved& saved, const CallShape& call);
/// Those of Routing::selection.
SelectionRows selected_rows(const CallShape& call);
/// The slice's rows in scratch memory.
SelectionRows rows_in(std::int32_t* blocks, const CallShape& call, const WorkSlice& slice,
                      std::int64_t stride);

/// Scratch bytes of a slice's selection where the caller provides no memory for it and selects no blocks.
std::size_t selection_bytes(const Call& call, const WorkSlice& slice);
/// Rows in scratch memory, for the gate to write. Those of a call that needs no scores are complete: none if
/// causal, else the one block of dense attention.
SliceSelection new_selection(const Call& call, const WorkSlice& slice, Scratch& scratch);

/// Writes the caller's rows of a call that needs no scores: every visible block if dense, else the own block.
void write_unscored_selection(const Call& call, const SliceSelection& selection);
/// Throws ArgumentError unless every row that the caller selects, or has saved, holds ascending blocks that
/// its query may see, a causal query's own among them, and padding. A saved selection that is null or that
/// the call does not read has nothing to check.
void check_selection(const Call& call);
void check_selection(const Call& call, const Saved& saved);

}  // namespace moba
