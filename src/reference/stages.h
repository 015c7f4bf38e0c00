#pragma once

#include "backend.h"

/// The specification: every stage as plain loops with double accumulators, in the notation of
/// docs/mathematics.md.
namespace moba::reference {

void append(const Append& rows, std::int64_t block, std::int64_t head);
BlockMeans centroids(const Call& call, std::int64_t head0, std::int64_t head1, Context& context);
void features(const Call& call, const SequenceView& s, std::int64_t head, std::int64_t block,
              const FeatureRows& to);
void gate(const Call& call, const BlockMeans& means, const SliceSelection& selection, Context& context);
Plan plan(const Call& call, const SliceSelection& selection, Context& context);
void attend(const Call& call, const SliceSelection& selection, const Plan& plan, const Outputs& outputs,
            Context& context);
void attend_backward(const Call& call, const SliceSelection& selection, const Plan& plan,
                     const Backward& backward, Context& context);
void decode(const Call& call, const BlockMeans& means, const Outputs& outputs, Context& context);

/// Scratch bytes of each stage; those of one worker where a stage has workers with memory of their own.
std::size_t centroids_bytes(const Call& call, std::int64_t heads);
std::size_t gate_bytes(const Call& call);
std::size_t plan_bytes(const Call& call, const WorkSlice& slice);
std::size_t attend_bytes(const Call& call);
std::size_t attend_backward_bytes(const Call& call, const WorkSlice& slice, int threads);

}  // namespace moba::reference
