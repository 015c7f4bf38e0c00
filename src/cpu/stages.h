#pragma once

#include "backend.h"

/// The stages of the CPU backend; backend.cpp lists them in its table.
namespace moba::cpu {

/// Selects the instruction set, once, before any kernel runs. Returns why none can be selected:
/// MOBA_CPU_TARGET names one that this CPU or build lacks.
const std::string& target_refusal();

Means centroids(const Problem& problem, std::int64_t head0, std::int64_t head1, Context& context);
Selection gate(const Problem& problem, const Means& means, const WorkSlice& slice, Context& context);
Plan plan(const Problem& problem, const Selection& selection, Context& context);
void attend(const Problem& problem, const Selection& selection, const Plan& plan, const Outputs& outputs,
            Context& context);
/// The ranges of a sequence and head follow each other; their number, `backward_parts`, depends on the
/// problem alone.
Plan plan_backward(const Problem& problem, const Selection& selection, Context& context);
void attend_backward(const Problem& problem, const Selection& selection, const Plan& plan,
                     const Backward& backward, Context& context);
void decode(const Problem& problem, const Means& means, const Outputs& outputs, Context& context);

/// Scratch bytes of one worker of `attend` for ranges of `rows` rows.
std::size_t attend_bytes(const Problem& problem, std::int64_t rows);
/// Scratch bytes of one worker of the gate.
std::size_t gate_bytes(const Problem& problem);
/// Scratch bytes of the rounded means of `heads` kv heads, where the gate screens in int8.
std::size_t screened_bytes(const Problem& problem, std::int64_t heads);
std::size_t plan_bytes(const Problem& problem, const WorkSlice& slice);
std::size_t plan_backward_bytes(const Problem& problem, const WorkSlice& slice);
std::size_t attend_backward_bytes(const Problem& problem, const WorkSlice& slice, int threads);
std::int64_t backward_parts(const Problem& problem, const SequenceView& sequence);
/// Rows of the smallest range that `plan` makes.
std::int64_t min_range_rows(const Problem& problem);

}  // namespace moba::cpu
