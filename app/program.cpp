#include "app/program.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "app/nearest.h"
#include "app/version.h"
#include "llm/error.h"

namespace moba::app {
namespace {

constexpr int kDataError = 1;
constexpr int kUsageError = 2;

/// Returns the message in one line: LibTorch's go on with a backtrace. Its allocator has no exception of its
/// own.
std::string brief(const std::string& text) {
  constexpr std::string_view kAllocator = "can't allocate memory: you tried to allocate ";
  const std::string line = text.substr(0, text.find('\n'));
  const std::size_t found = line.find(kAllocator);
  if (found == std::string::npos) return line;
  const std::size_t digits = found + kAllocator.size();
  return "out of memory: expected " + line.substr(digits, line.find(' ', digits) - digits) +
         " bytes more, got none";
}

/// "file: expected X, got Y" for a file that could not be created, renamed or removed.
std::string brief(const std::filesystem::filesystem_error& error) {
  const std::filesystem::path& path = error.path2().empty() ? error.path1() : error.path2();
  return path.string() + ": expected a file or folder that can be written, got " + error.code().message();
}

/// "moba eval needle".
std::string command_of(const CLI::App& app) {
  std::string command = app.get_name();
  for (auto used = app.get_subcommands(); !used.empty(); used = used.front()->get_subcommands())
    command += " " + used.front()->get_name();
  return command;
}

/// Returns the last subcommand of the command line.
const CLI::App& used_subcommand(const CLI::App& app) {
  const auto used = app.get_subcommands();
  return used.empty() ? app : used_subcommand(*used.front());
}

int fail(const CLI::App& app, const std::string& message, int code) {
  std::fprintf(stderr, "%s: %s\n", command_of(app).c_str(), message.c_str());
  return code;
}

std::vector<std::string> subcommands_of(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::App* subcommand : command.get_subcommands(nullptr)) names.push_back(subcommand->get_name());
  return names;
}

/// The long names of the flags that --help lists.
std::vector<std::string> flags_of(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    if (option->get_group().empty()) continue;
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

/// Describes the first argument that no flag and no subcommand takes.
std::string unexpected(const CLI::App& app, const std::vector<std::string>& arguments) {
  const CLI::App& command = used_subcommand(app);
  const auto is_flag = [](const std::string& argument) { return argument.size() > 1 && argument[0] == '-'; };
  const auto flag = std::find_if(arguments.begin(), arguments.end(), is_flag);
  const bool is_subcommand = command.get_require_subcommand_min() > 0 && flag != arguments.begin();
  const std::string& argument = is_subcommand || flag == arguments.end() ? arguments.front() : *flag;
  const std::string word = argument.substr(0, argument.find('='));
  const std::string near = nearest(word, is_subcommand ? subcommands_of(command) : flags_of(command));
  return "expected a " + std::string(is_subcommand ? "subcommand" : "flag") + " (see " + command_of(app) +
         " --help), got " + word + (near.empty() ? "" : "; did you mean " + near + "?");
}

/// Describes a command that has subcommands.
nlohmann::ordered_json description_of(const CLI::App& command) {
  nlohmann::ordered_json json{{"description", command.get_description()}, {"examples", command.get_footer()}};
  for (const CLI::App* subcommand : command.get_subcommands(nullptr))
    json["subcommands"].push_back(
        {{"name", subcommand->get_name()}, {"description", subcommand->get_description()}});
  return json;
}

/// Adds --help-json to the commands that have subcommands; a FlagTable adds it to the others.
void describe_commands(CLI::App& command) {
  if (command.get_require_subcommand_min() == 0) return;
  add_description_flag(command, [&command] { return description_of(command); });
  for (CLI::App* subcommand : command.get_subcommands(nullptr)) describe_commands(*subcommand);
}

/// Help and version go to standard output; every other message of CLI11 becomes one line.
int explain(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) return app.exit(error);
  std::string message = error.what();
  const std::vector<std::string> left = app.remaining(/*recurse=*/true);
  if (!left.empty()) message = unexpected(app, left);
  std::replace(message.begin(), message.end(), '\n', ' ');
  return fail(app, message, kUsageError);
}

}  // namespace

int run(CLI::App& app, const std::function<int()>& action, int argc, char** argv) {
  describe_commands(app);
  app.set_version_flag("--version", version_text, "Print version, build and instruction sets, and exit");
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
  } catch (const std::filesystem::filesystem_error& error) {
    return fail(app, brief(error), kDataError);
  } catch (const std::exception& error) {
    return fail(app, brief(std::string(error.what())), kDataError);
  }
}

void add_description_flag(CLI::App& command, std::function<nlohmann::ordered_json()> description) {
  const auto print_description = [description = std::move(description)] {
    print(description().dump(2) + "\n");
    throw CLI::Success();
  };
  command.add_flag_callback("--help-json", print_description)->group("");
}

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw llm::DataError("standard output: cannot be written");
  }
}

}  // namespace moba::app
