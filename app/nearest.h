#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace moba::app {

/// Returns the candidate that `word` was probably meant to be: the one with the smallest edit distance
/// (insertions, deletions, substitutions and swaps of neighbours), which may be a third of the word's length.
/// Returns an empty text if none is that near.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace moba::app
