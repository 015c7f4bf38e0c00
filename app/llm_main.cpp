// The subcommands that run a model, started by `moba`.
#include "app/commands.h"
#include "app/program.h"

int main(int argc, char** argv) {
  CLI::App app("The subcommands of moba that run a model", "moba");
  app.require_subcommand(1);
  std::function<int()> action;
  moba::app::add_eval(app, action);
  moba::app::add_generate(app, action);
  moba::app::add_inspect(app, action);
  moba::app::add_train(app, action);
  return moba::app::run(app, action, argc, argv);
}
