#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string_view>

namespace moba::app {

/// Parses the arguments (none: prints the help), runs the subcommand that sets `action`, and turns whatever
/// goes wrong into one line on standard error and exit code 2 (usage) or 1 (data).
int run(CLI::App& app, const std::function<int()>& action, int argc, char** argv);

/// Adds the hidden flag --help-json, which prints `description` and ends the program.
void add_description_flag(CLI::App& command, std::function<nlohmann::ordered_json()> description);

/// Writes to standard output, at once. Throws DataError where that is not to be.
void print(std::string_view text);

}  // namespace moba::app
