#include "app/program.h"

#include <algorithm>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "llm/error.h"

namespace moba::app {
namespace {

constexpr int kDataError = 1;
constexpr int kUsageError = 2;

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

/// "moba eval needle".
std::string command_of(const CLI::App& app) {
  std::string command = app.get_name();
  for (auto used = app.get_subcommands(); !used.empty(); used = used.front()->get_subcommands())
    command += " " + used.front()->get_name();
  return command;
}

/// Returns whether a subcommand is missing where one is needed.
bool lacks_subcommand(const CLI::App& app) {
  const auto used = app.get_subcommands();
  return used.empty() ? app.get_require_subcommand_min() > 0 : lacks_subcommand(*used.front());
}

int fail(const CLI::App& app, const std::string& message, int code) {
  std::fprintf(stderr, "%s: %s\n", command_of(app).c_str(), message.c_str());
  return code;
}

/// Help and version go to standard output; every other message of CLI11 becomes one line.
int explain(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) return app.exit(error);
  std::string message = error.what();
  const std::vector<std::string> left = app.remaining(/*recurse=*/true);
  if (lacks_subcommand(app) && !left.empty()) {
    message = "expected a subcommand (see " + command_of(app) + " --help), got " + left.front();
  }
  std::replace(message.begin(), message.end(), '\n', ' ');
  return fail(app, message, kUsageError);
}

}  // namespace

int run(CLI::App& app, const std::function<int()>& action, int argc, char** argv) {
  try {
    if (argc < 2) throw CLI::CallForHelp();
    app.parse(argc, argv);
    return action();
  } catch (const CLI::ParseError& error) {
    return explain(app, error);
  } catch (const llm::UsageError& error) {
    return fail(app, error.what(), kUsageError);
  } catch (const std::bad_alloc&) {
    return fail(app, "out of memory", kDataError);
  } catch (const std::exception& error) {
    return fail(app, first_line(error.what()), kDataError);  // LibTorch's go on with a backtrace
  }
}

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw llm::DataError("standard output: cannot be written");
  }
}

}  // namespace moba::app
