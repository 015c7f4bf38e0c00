#pragma once

#include "backend.h"

/// The stages of the CPU backend; backend.cpp lists them in its table.
namespace moba::cpu {

/// Selects the instruction set, once, before any kernel runs. Returns why none can be selected:
/// MOBA_CPU_TARGET names one that this CPU or build lacks.
const std::string& target_refusal();

void append(const Append& rows, std::int64_t block, std::int64_t head);
BlockMeans centroids(const Call& call, std::int64_t head0, std::int64_t head1, Context& context);
void features(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t block,
              const FeatureRows& to);
void gate(const Call& call, const BlockMeans& means, const SliceSelection& selection, Context& context);
Plan plan(const Call& call, const SliceSelection& selection, Context& context);
void attend(const Call& call, const SliceSelection& selection, const Plan& plan, const Outputs& outputs,
            Context& context);
/// The ranges of a sequence and head follow each other; their number, `backward_parts`, depends on the
/// call alone.
Plan plan_backward(const Call& call, const SliceSelection& selection, Context& context);
void attend_backward(const Call& call, const SliceSelection& selection, const Plan& plan,
                     const Backward& backward, Context& context);
void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, Context& context);

/// Scratch bytes of one worker of `attend` for ranges of `rows` rows.
std::size_t attend_bytes(const Call& call, std::int64_t rows);
/// Scratch bytes of one worker of the gate.
std::size_t gate_bytes(const Call& call);
/// Scratch bytes of the rounded means of `heads` kv heads, where the gate screens in int8.
std::size_t screened_bytes(const Call& call, std::int64_t heads);
std::size_t plan_bytes(const Call& call, const WorkSlice& slice, int threads);
std::size_t plan_backward_bytes(const Call& call, const WorkSlice& slice);
std::size_t attend_backward_bytes(const Call& call, const WorkSlice& slice, int threads);
std::int64_t backward_parts(const Call& call, const SequenceView& sequence);
/// Rows of the smallest range that `plan` makes.
std::int64_t min_range_rows(const Call& call);

}  // namespace moba::cpu
