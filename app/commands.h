#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace moba::app {

/// Every subcommand's flags; parsing sets `action` to what it does, which gives the exit code.
CLI::App* add_bench(CLI::App& parent, std::function<int()>& action);
/// `bench` with a model, which add_bench() does not know.
CLI::App* add_bench_model(CLI::App& parent, std::function<int()>& action);
CLI::App* add_calibrate(CLI::App& parent, std::function<int()>& action);
CLI::App* add_eval(CLI::App& parent, std::function<int()>& action);
CLI::App* add_generate(CLI::App& parent, std::function<int()>& action);
CLI::App* add_info(CLI::App& parent, std::function<int()>& action);
CLI::App* add_inspect(CLI::App& parent, std::function<int()>& action);
CLI::App* add_serve(CLI::App& parent, std::function<int()>& action);
CLI::App* add_tokenize(CLI::App& parent, std::function<int()>& action);
CLI::App* add_train(CLI::App& parent, std::function<int()>& action);

}  // namespace moba::app
