#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "app/commands.h"
#include "app/plot/loss_plot.h"
#include "app/train_settings.h"
#include "llm/train/run.h"
#include "src/stopwatch.h"

namespace moba::app {
namespace {

using llm::train::Run;
using llm::train::StepRecord;

constexpr int kSignalled = 128;  // what shells add to a signal's number

volatile std::sig_atomic_t stop_requested = 0;

/// Lines on standard output, and on a terminal a line below them that shows how far the run has come.
class Progress {
 public:
  Progress(std::int64_t first, std::int64_t steps) : first_(first), steps_(steps) {}

  void print(const StepRecord& record) {
    std::fputs(terminal_ ? "\r\033[K" : "", stdout);
    const std::string line = fmt::format(
        "step: {:>5}  loss: {:8.5f}  grad_norm: {:8.4f}  lr: {:.2e}  tps: {:>8.0f}  attention: {} {:>4.1f}%  "
        "memory: {:.2f}GiB\n",
        record.step, record.loss, record.grad_norm, record.learning_rate, record.tokens_per_second,
        record.attention, 100 * record.attention_share, record.memory_gib);
    std::fputs(line.c_str(), stdout);
    if (terminal_) std::fputs(bar(record.step).c_str(), stdout);
    std::fflush(stdout);
  }

  void end() const {
    if (terminal_) std::fputs("\r\033[K", stdout);
  }

 private:
  std::string bar(std::int64_t step) const {
    constexpr std::int64_t kWidth = 30;
    const std::int64_t filled = kWidth * step / steps_;
    const double passed = stopwatch_.seconds();
    const auto left = static_cast<std::int64_t>(passed * static_cast<double>(steps_ - step) /
                                                static_cast<double>(step - first_));
    return fmt::format("[{:#<{}}{:<{}}] {}/{}, {}:{:02}:{:02} left", "", filled, "", kWidth - filled, step,
                       steps_, left / 3600, left / 60 % 60, left % 60);
  }

  bool terminal_ = isatty(STDOUT_FILENO) == 1;
  std::int64_t first_, steps_;
  Stopwatch stopwatch_;
};

int train(const FlagTable& flags, TrainSettings& settings) {
  complete(flags, settings);
  Run run(settings, [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); });
  if (run.step() >= run.steps()) {
    std::fprintf(stderr, "nothing to do: all %lld steps are done\n", static_cast<long long>(run.steps()));
    return 0;
  }
  const auto millions = [](std::int64_t count) {
    return fmt::format("{:.2f}M", static_cast<double>(count) / 1e6);
  };
  const std::string summary =
      fmt::format("{} parameters, {} trained; {} tokens of data; steps {} to {} in {}",
                  millions(run.parameters()), millions(run.trained_parameters()), millions(run.data_tokens()),
                  run.step() + 1, run.steps(), settings.out.string());
  std::fprintf(stderr, "%s\n", summary.c_str());

  for (const int signal : {SIGINT, SIGTERM}) {
    std::signal(signal, [](int number) {
      stop_requested = number;
      std::signal(number, SIG_DFL);  // asked twice, it ends at once
    });
  }
  Progress progress(run.step(), run.steps());
  run.train([&](const StepRecord& record) { progress.print(record); }, [] { return stop_requested != 0; });
  progress.end();
  plot_losses(settings.out / "log.jsonl", settings.out / "loss.svg");
  if (stop_requested == 0) return 0;
  std::fprintf(stderr, "stopped and saved after step %lld; --resume goes on\n",
               static_cast<long long>(run.step()));
  return kSignalled + stop_requested;
}

}  // namespace

CLI::App* add_train(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("train", "Train a model, from scratch or further");
  const auto flags = std::make_shared<FlagTable>(*command);
  const auto settings = std::make_shared<TrainSettings>();
  add_flags(*flags, *settings);
  command->footer(
      "Example: nine tenths of the steps with MoBA, the last with full attention\n"
      "  moba train --config llama-tiny.json --data books/ --out run1 --steps 1000 --seq-len 8192 \\\n"
      "    --attn-schedule moba:0.9,full:0.1\n");
  command->callback([=, &action] { action = [=] { return train(*flags, *settings); }; });
  return command;
}

}  // namespace moba::app
