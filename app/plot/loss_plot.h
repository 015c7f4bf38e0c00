#pragma once

#include <filesystem>

namespace moba::app {

/// Draws the losses of a log.jsonl, one value a step and a running mean, as an SVG; stretches of steps with
/// full attention are shaded where others had MoBA. A log without a step gives no picture. Throws DataError.
void plot_losses(const std::filesystem::path& log, const std::filesystem::path& picture);

}  // namespace moba::app
