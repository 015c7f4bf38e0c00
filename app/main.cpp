// The program. What needs LibTorch is a program of its own beside it, moba-llm: loading LibTorch takes longer
// than most of what the other subcommands do.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "app/commands.h"
#include "app/program.h"
#include "llm/error.h"

namespace {

/// OpenMP's threads wait for each other by spinning for milliseconds, which on a machine that others use too
/// (or in a container with a quota) makes every product wait for a time slice: a hundred times slower. They
/// read how long to spin when they are loaded.
void spin_briefly() {
  if (std::getenv("OMP_WAIT_POLICY") == nullptr) setenv("GOMP_SPINCOUNT", "1000", 0);  // some 50 microseconds
}

/// oneDNN, and LibTorch's wrapper around it, keep the compiled product of every shape that they have met,
/// 1024 of them, and prompts are read in chunks of any number of tokens: without limits a server grows by
/// half a GiB. They read these at their first product.
void keep_few_products() {
  setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64", 0);
  setenv("LRU_CACHE_CAPACITY", "64", 0);
}

/// Goes on as moba-llm, which knows the flags; returns only where that fails.
[[noreturn]] void hand_over(char** argv) {
  const std::filesystem::path program =
      std::filesystem::read_symlink("/proc/self/exe").parent_path() / "moba-llm";
  spin_briefly();
  keep_few_products();
  execv(program.c_str(), argv);
  throw moba::llm::UsageError("cannot start " + program.string() +
                              ", which is built and installed beside moba: " + std::strerror(errno));
}

/// Returns whether the command line is `moba bench` with -m, --model, whose flags moba-llm knows.
bool is_model_bench(std::span<char*> arguments) {
  const auto names_model = [](std::string_view argument) {
    return argument.starts_with("-m") || argument == "--model" || argument.starts_with("--model=");
  };
  return arguments.size() > 2 && arguments[1] == std::string_view("bench") &&
         std::any_of(arguments.begin() + 2, arguments.end(), names_model);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Language models that read long documents with Mixture of Block Attention", "moba");
  app.require_subcommand(1);
  std::function<int()> action;
  const auto add_handed_over = [&](const char* name, const char* what) {
    CLI::App* command = app.add_subcommand(name, what);
    command->prefix_command();
    command->set_help_flag();
    command->callback([&] { action = [argv]() -> int { hand_over(argv); }; });
  };
  add_handed_over("generate", "Read a prompt or a long document and answer");
  add_handed_over("train", "Train a model, from scratch or further");
  add_handed_over("eval", "Measure what a model predicts and finds");
  add_handed_over("calibrate", "Find how a model that was not trained with MoBA may use it, layer by layer");
  add_handed_over("inspect", "Show which blocks every layer and head selects");
  add_handed_over("serve", "Answer requests of OpenAI's API, many at a time, by HTTP");
  if (is_model_bench({argv, static_cast<std::size_t>(argc)})) {
    add_handed_over("bench", "Time a model");
  } else {
    moba::app::add_bench(app, action);
  }
  moba::app::add_info(app, action);
  moba::app::add_tokenize(app, action);
  return moba::app::run(app, action, argc, argv);
}
