#pragma once

#include "backend.h"

namespace moba::host {

/// One call on a host backend: its operations, bound to the call's threads, scratch memory and profile. Adds
/// the profile to Execution::profile when the call has ended.
class Run {
 public:
  Run(const Call& call, const Execution& execution);
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  /// Slices of the forward pass, and those of the backward pass, which hold all tokens of their heads.
  std::vector<WorkSlice> forward_slices() const;
  std::vector<WorkSlice> backward_slices() const;

  /// No means if no query has to select.
  BlockMeans centroids(const WorkSlice& slice);
  /// The means of all blocks, for a cache.
  BlockMeans centroids();
  /// Writes `outputs.selection` if it is not null. Returns the caller's selection where there is one.
  SliceSelection gate(const BlockMeans& means, const WorkSlice& slice, const Outputs& outputs = {});
  Plan plan(const SliceSelection& selection);
  void attend(const SliceSelection& selection, const Plan& plan, const Outputs& outputs);
  Plan plan_backward(const SliceSelection& selection);
  void attend_backward(const SliceSelection& selection, const Plan& plan, const Backward& backward);
  void features(const BlockFeatures& to);
  void decode(const BlockMeans& means, const Outputs& outputs);

 private:
  template <typename Stage>
  auto timed(double Profile::*seconds, Stage&& stage);

  const Call& call_;
  const Execution& execution_;
  const Backend& backend_;
  Cancel cancelled_;
  Parallel parallel_;
  Scratch scratch_;
  Context context_;
  Profile profile_{};
};

}  // namespace moba::host
