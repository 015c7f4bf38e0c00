// The subcommands that run a model, started by `moba`.
#include <cstdio>
#include <cstdlib>

#include "app/commands.h"
#include "app/program.h"

int main(int argc, char** argv) {
  CLI::App app("The subcommands of moba that run a model", "moba");
  app.require_subcommand(1);
  std::function<int()> action;
  moba::app::add_bench_model(app, action);
  moba::app::add_calibrate(app, action);
  moba::app::add_eval(app, action);
  moba::app::add_generate(app, action);
  moba::app::add_inspect(app, action);
  moba::app::add_serve(app, action);
  moba::app::add_train(app, action);
  const int code = moba::app::run(app, action, argc, argv);
  std::fflush(nullptr);
  std::_Exit(code);  // LibTorch's static objects take longer to destroy than the first token to write
}
