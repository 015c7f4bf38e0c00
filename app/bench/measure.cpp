#include "app/bench/measure.h"

#include <fmt/format.h>

#include <algorithm>

#include "app/bench/bench_case.h"
#include "llm/error.h"

namespace moba::bench {
namespace {

using Bytes = std::vector<std::byte>;

Bytes copy_of(BenchCase& bench_case) {
  Bytes all;
  for (const auto& part : bench_case.sample()) all.insert(all.end(), part.begin(), part.end());
  return all;
}

/// The stages of all runs, to take medians of.
struct Times {
  /// The number of timed runs; none: the run that was checked is the only one.
  int runs = 0;
  std::vector<double> seconds{};
  std::vector<Profile> stages{};
};

Times times_for(const Checked& checked, const Conditions& conditions) {
  const double fitting = conditions.budget_seconds / checked.wall_seconds;
  if (fitting < 1) return {.seconds = {checked.seconds}, .stages = {checked.stages}};
  return {.runs = static_cast<int>(std::min<double>(conditions.runs, fitting))};
}

Profile medians(const std::vector<Profile>& runs) {
  Profile result;
  for (double Profile::*stage : {&Profile::centroids, &Profile::gate, &Profile::plan, &Profile::attend}) {
    std::vector<double> values(runs.size());
    std::ranges::transform(runs, values.begin(), stage);
    std::ranges::sort(values);
    result.*stage = values[values.size() / 2];
  }
  for (const Profile& run : runs)
    result.workspace_bytes = std::max(result.workspace_bytes, run.workspace_bytes);
  return result;
}

void time_once(BenchCase& bench_case, const Bytes& expected, Times& times) {
  for (const auto& part : bench_case.sample()) poison(part);
  Profile stages;
  times.seconds.push_back(bench_case.run(stages));
  times.stages.push_back(stages);
  if (copy_of(bench_case) != expected)
    throw llm::DataError("a timed run gave other values than the one that was checked");
}

std::string title(const Setting& s, const Variant& variant) {
  return fmt::format("{} of {} tokens, chunk {}, topk {}, {}", name_of(s.pass), s.tokens, variant.chunk_size,
                     variant.topk, name_of(s.dtype));
}

}  // namespace

std::vector<Row> measure(const Setting& setting, const std::vector<Variant>& variants,
                         const Conditions& conditions,
                         const std::function<void(const std::string&)>& progress) {
  const Parallel parallel = openmp(conditions.threads);
  const bool decoding = setting.pass == Pass::decode;
  Ceiling ceiling(parallel, setting.pass == Pass::forward && setting.dtype == DType::bf16, decoding);
  const auto measure_ceiling = [&] {
    ceiling.measure_arithmetic();
    if (decoding) ceiling.sweep();
  };

  progress(fmt::format("{} of {} tokens: making the data", name_of(setting.pass), setting.tokens));
  const auto all = make_bench_cases(setting, variants, conditions, parallel, ceiling);
  std::vector<Row> rows;
  std::vector<Bytes> expected;
  std::vector<Times> times;
  for (std::size_t i = 0; i < all.size(); ++i) {
    progress(title(setting, variants[i]) + ": checking the result");
    const Checked checked = all[i]->check();
    rows.push_back({.setting = setting,
                    .variant = variants[i],
                    .threads = conditions.threads,
                    .work = checked.work,
                    .checked_rows = checked.rows,
                    .ties = checked.ties});
    expected.push_back(copy_of(*all[i]));
    times.push_back(times_for(checked, conditions));
  }

  for (int run = 0; run < conditions.runs; ++run) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (run >= times[i].runs) continue;
      progress(fmt::format("{}: run {} of {}", title(setting, variants[i]), run + 1, times[i].runs));
      measure_ceiling();
      time_once(*all[i], expected[i], times[i]);
    }
  }
  measure_ceiling();
  for (std::size_t i = 0; i < all.size(); ++i) {
    rows[i].seconds = times[i].seconds;
    std::ranges::sort(rows[i].seconds);
    rows[i].stages = medians(times[i].stages);
    rows[i].ceilings = ceiling.best();
    rows[i].peak_rss_bytes = peak_rss_bytes();
  }
  return rows;
}

}  // namespace moba::bench
