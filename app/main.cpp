#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <new>
#include <string>
#include <system_error>

#include "app/commands.h"
#include "llm/error.h"
#include "moba/error.h"

namespace {

constexpr int kDataError = 1;
constexpr int kUsageError = 2;

std::string first_line(std::string text) {
  return text.substr(0, text.find('\n'));
}

int fail(const CLI::App& app, const std::string& message, int code) {
  std::string command = app.get_name();
  for (const CLI::App* sub : app.get_subcommands()) command += " " + sub->get_name();
  std::fprintf(stderr, "%s: %s\n", command.c_str(), message.c_str());
  return code;
}

/// Help and version go to standard output; everything else that CLI11 says becomes one line.
int explain(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) return app.exit(error);
  std::string message = error.what();
  if (app.get_subcommands().empty() && !app.remaining().empty()) {
    message = "expected a subcommand (see moba --help); found " + app.remaining().front();
  }
  std::replace(message.begin(), message.end(), '\n', ' ');
  return fail(app, message, kUsageError);
}

/// OpenMP's threads wait for each other by spinning for milliseconds, which on a machine that others use too
/// (or in a container with a quota) makes every product wait for a time slice: a hundred times slower. They
/// read how long to spin when they are loaded, so the program starts itself again with some 50 microseconds.
void spin_briefly(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("GOMP_SPINCOUNT", "1000", 1);
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) execv(program.c_str(), argv);  // where that fails, this one goes on
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Language models that read long documents with Mixture of Block Attention", "moba");
  app.set_version_flag("--version", "moba " MOBA_VERSION);
  app.require_subcommand(1);
  std::function<int()> action;
  moba::app::add_generate(app, action);
  moba::app::add_bench(app, action);
  moba::app::add_info(app, action);
  moba::app::add_tokenize(app, action);

  try {
    app.parse(argc, argv);
    if (app.got_subcommand("generate")) spin_briefly(argv);
    return action();
  } catch (const CLI::ParseError& error) {
    return explain(app, error);
  } catch (const moba::llm::UsageError& error) {
    return fail(app, error.what(), kUsageError);
  } catch (const std::bad_alloc&) {
    return fail(app, "out of memory", kDataError);
  } catch (const std::exception& error) {
    return fail(app, first_line(error.what()), kDataError);  // LibTorch's go on with a backtrace
  }
}
