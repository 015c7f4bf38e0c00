#include "app/bench/report.h"

#include <fmt/format.h>

#include <algorithm>

namespace moba::bench {
namespace {

std::string duration(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.3f} s", seconds);
}

/// Half the distance from the fastest to the slowest run, in per cent of the median.
double spread_percent(const Row& row) {
  return 50 * (row.seconds.back() - row.seconds.front()) / row.median();
}

/// Says so where a budget allowed fewer runs than the usual five.
std::string few_runs(const Row& row) {
  const std::size_t runs = row.seconds.size();
  return runs >= 5 ? "" : runs == 1 ? ", 1 run" : fmt::format(", {} runs", runs);
}

std::vector<std::string> cells(const Row& row) {
  const Setting& s = row.setting;
  const std::string heads =
      s.heads == s.kv_heads ? fmt::format("{}", s.heads) : fmt::format("{}/{}", s.heads, s.kv_heads);
  const std::string blocks =
      row.variant.topk == 0 ? "full" : fmt::format("({}, {})", row.variant.chunk_size, row.variant.topk);
  const std::string rate = s.pass == Pass::decode
                               ? fmt::format("{:.1f} GB/s", row.work.read_bytes / row.median() / 1e9)
                               : fmt::format("{:.0f} GF/s", row.gflops());
  return {name_of(s.pass),
          fmt::format("{}{}", s.tokens, s.share < 1 ? fmt::format(" x{:g}", s.share) : ""),
          blocks,
          heads,
          fmt::format("{}", s.head_dim),
          name_of(s.dtype),
          name_of(s.pattern),
          fmt::format("{} +-{:.0f}%{}", duration(row.median()), spread_percent(row), few_runs(row)),
          rate,
          fmt::format("{:.1f}% {}", 100 * row.fraction_of_peak(), row.ceiling()),
          duration(row.stages.centroids),
          duration(row.stages.gate),
          duration(row.stages.plan),
          duration(row.stages.attend),
          fmt::format("{:.1f} MiB", static_cast<double>(row.stages.workspace_bytes) / (1 << 20))};
}

}  // namespace

nlohmann::ordered_json to_json(const Row& row) {
  const Setting& s = row.setting;
  return {{"pass", name_of(s.pass)},
          {"tokens", s.tokens},
          {"chunk_size", row.variant.chunk_size},
          {"topk", row.variant.topk},
          {"heads", s.heads},
          {"kv_heads", s.kv_heads},
          {"head_dim", s.head_dim},
          {"dtype", name_of(s.dtype)},
          {"routing", name_of(s.pattern)},
          {"threads", row.threads},
          {"share", s.share},
          {"seconds_median", row.median()},
          {"seconds_min", row.seconds.front()},
          {"seconds_max", row.seconds.back()},
          {"centroids_seconds", row.stages.centroids},
          {"gate_seconds", row.stages.gate},
          {"plan_seconds", row.stages.plan},
          {"attend_seconds", row.stages.attend},
          {"gflops", row.gflops()},
          {"attention_flops", row.work.attention_flops},
          {"gate_flops", row.work.gate_flops},
          {"read_bytes", row.work.read_bytes},
          {"ceiling", row.ceiling()},
          {"fraction_of_peak", row.fraction_of_peak()},
          {"fma_gflops", row.ceilings.fma_gflops},
          {"bf16_gflops", row.ceilings.bf16_gflops},
          {"read_gb_per_s", row.ceilings.read_gb_per_s},
          {"workspace_bytes", row.stages.workspace_bytes},
          {"peak_rss_bytes", row.peak_rss_bytes},
          {"checked_rows", row.checked_rows},
          {"ties", row.ties},
          {"seconds", row.seconds}};
}

std::string json_text(const std::vector<Row>& rows) {
  auto list = nlohmann::ordered_json::array();
  for (const Row& row : rows) list.push_back(to_json(row));
  return list.dump(2) + "\n";
}

std::string csv_text(const std::vector<Row>& rows) {
  std::string text;
  for (const Row& row : rows) {
    auto json = to_json(row);
    json.erase("seconds");
    std::vector<std::string> names, values;
    for (const auto& [name, value] : json.items()) {
      names.push_back(name);
      values.push_back(value.is_string() ? value.get<std::string>() : value.dump());
    }
    if (text.empty()) text = fmt::format("{}\n", fmt::join(names, ","));
    text += fmt::format("{}\n", fmt::join(values, ","));
  }
  return text;
}

std::string table_text(const std::vector<Row>& rows) {
  std::vector<std::vector<std::string>> lines{{"pass", "tokens", "blocks", "heads", "dim", "dtype", "routing",
                                               "time", "rate", "of peak", "centroids", "gate", "plan",
                                               "attend", "scratch"}};
  for (const Row& row : rows) lines.push_back(cells(row));
  std::vector<std::size_t> widths(lines.front().size());
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  std::string text;
  for (const auto& line : lines) {
    std::string padded;
    for (std::size_t i = 0; i < line.size(); ++i) padded += fmt::format("{:<{}}  ", line[i], widths[i]);
    padded.erase(padded.find_last_not_of(' ') + 1);
    text += fmt::format("{}\n", padded);
  }
  return text;
}

}  // namespace moba::bench
