#pragma once

#include <chrono>
#include <vector>

#include "backend.h"

namespace moba {

/// Kv heads [head0, head1), whose block means are held together, and the shares of the queries worked on in
/// turn.
struct HeadGroup {
  std::int64_t head0 = 0, head1 = 0;
  std::vector<WorkSlice> groups;
};

/// Cuts a problem so that each group's scratch memory fits the budget: first between heads, then between
/// queries. Throws Error when even the smallest group does not fit.
std::vector<HeadGroup> groups_within(const Backend& backend, const Problem& problem, int threads,
                                     std::size_t budget);

/// Head groups alone, for the backward pass, whose groups span all queries.
std::vector<WorkSlice> head_groups_within(const Backend& backend, const Problem& problem, int threads,
                                          std::size_t budget);

/// A group's rows of the public [Hq, Tq, selection_width()] list, current block included.
void write_selection(const Problem& problem, const Selection& selection, std::int32_t* out);
/// Throws ArgumentError unless `saved`, null or [Hq, Tq, selection_width()], lists blocks that each query may
/// see. Runs over all heads, before a gradient is written.
void check_saved_selection(const Problem& problem, const std::int32_t* saved);
/// The inverse of write_selection: the group's selection as the gate writes it, from a checked public list.
Selection read_selection(const Problem& problem, const WorkSlice& group, const std::int32_t* saved,
                         Scratch& scratch);

/// Runs one stage and adds its seconds to where they belong.
template <typename Stage>
auto timed(double Profile::*seconds, Profile& profile, Stage&& stage) {
  struct Clock {
    double& total;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~Clock() { total += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); }
  };
  const Clock clock{profile.*seconds};
  return stage();
}

void add_profile(const Execution& execution, const Profile& profile, const Scratch& scratch);

}  // namespace moba
