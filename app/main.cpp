// The program. What needs LibTorch is a program of its own beside it, moba-llm: loading LibTorch takes longer
// than most of what the other subcommands do.
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

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

/// Goes on as moba-llm, which knows the flags; returns only where that fails.
[[noreturn]] void hand_over(char** argv) {
  const std::filesystem::path program =
      std::filesystem::read_symlink("/proc/self/exe").parent_path() / "moba-llm";
  spin_briefly();
  execv(program.c_str(), argv);
  throw moba::llm::UsageError("cannot start " + program.string() +
                              ", which is built and installed beside moba: " + std::strerror(errno));
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Language models that read long documents with Mixture of Block Attention", "moba");
  app.set_version_flag("--version", "moba " MOBA_VERSION);
  app.require_subcommand(1);
  std::function<int()> action;
  for (const auto& [name, what] : {std::pair("generate", "Read a prompt or a long document and answer"),
                                   std::pair("train", "Train a model, from scratch or further"),
                                   std::pair("eval", "Measure what a model predicts and finds"),
                                   std::pair("inspect", "Show which blocks every layer and head selects")}) {
    CLI::App* command = app.add_subcommand(name, what);
    command->prefix_command();
    command->set_help_flag();
    command->callback([&] { action = [argv]() -> int { hand_over(argv); }; });
  }
  moba::app::add_bench(app, action);
  moba::app::add_info(app, action);
  moba::app::add_tokenize(app, action);
  return moba::app::run(app, action, argc, argv);
}
