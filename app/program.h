#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace moba::app {

/// Parses the arguments, runs the subcommand that sets `action`, and turns whatever goes wrong into one line
/// on standard error and exit code 2 (usage) or 1 (data).
int run(CLI::App& app, const std::function<int()>& action, int argc, char** argv);

}  // namespace moba::app
