#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <numeric>

#include "app/bench_model.h"
#include "app/model_summary.h"

namespace moba::app {
namespace {

/// Mean and sample standard deviation.
struct Statistics {
  double mean = 0, deviation = 0;
};

Statistics statistics(const std::vector<double>& samples) {
  const auto count = static_cast<double>(samples.size());
  const double mean = std::accumulate(samples.begin(), samples.end(), 0.0) / count;
  double squares = 0;
  for (const double sample : samples) squares += (sample - mean) * (sample - mean);
  return {mean, samples.size() > 1 ? std::sqrt(squares / (count - 1)) : 0};
}

std::vector<double> tokens_per_second(const ModelRow& row) {
  std::vector<double> rates;
  for (const double seconds : row.seconds) rates.push_back(static_cast<double>(row.test.tokens()) / seconds);
  return rates;
}

std::vector<std::int64_t> nanoseconds(const ModelRow& row) {
  std::vector<std::int64_t> samples;
  for (const double seconds : row.seconds) samples.push_back(std::llround(seconds * 1e9));
  return samples;
}

/// The keys are those of llama-bench where it has them.
Json to_json(const BenchedModel& model, const ModelRow& row) {
  const std::vector<double> rates = tokens_per_second(row);
  const Statistics time = statistics(row.seconds), rate = statistics(rates);
  Json json{{"model_filename", model.file},       {"model_type", model.type}, {"model_size", model.bytes},
            {"model_n_params", model.parameters}, {"backends", "CPU"},        {"n_threads", model.threads},
            {"attn", name_of(row.test.attention)}};
  json.update(model.settings);
  json.update({{"n_prompt", row.test.prompt},
               {"n_gen", row.test.generated},
               {"n_depth", row.test.depth},
               {"avg_ns", std::llround(time.mean * 1e9)},
               {"stddev_ns", std::llround(time.deviation * 1e9)},
               {"avg_ts", rate.mean},
               {"stddev_ts", rate.deviation},
               {"samples_ns", nanoseconds(row)},
               {"samples_ts", rates}});
  return json;
}

/// Quotes what holds a comma or a quote.
std::string csv_field(const Json& value) {
  const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted;
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return fmt::format("\"{}\"", quoted);
}

}  // namespace

std::string name_of(const ModelTest& test) {
  const std::string name =
      test.prompt > 0 ? fmt::format("pp{}", test.prompt) : fmt::format("tg{}", test.generated);
  return test.depth > 0 ? fmt::format("{} @ d{}", name, test.depth) : name;
}

std::string table_text(const BenchedModel& model, const std::vector<ModelRow>& rows) {
  std::string text =
      "| model | size | params | backend | threads | attn | test | t/s |\n"
      "| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |\n";
  for (const ModelRow& row : rows) {
    const Statistics rate = statistics(tokens_per_second(row));
    text += fmt::format("| {} | {} | {} | CPU | {} | {} | {} | {:.2f} ± {:.2f} |\n", model.type,
                        bytes_text(model.bytes), count_text(model.parameters), model.threads,
                        name_of(row.test.attention), name_of(row.test), rate.mean, rate.deviation);
  }
  return text;
}

std::string csv_text(const BenchedModel& model, const std::vector<ModelRow>& rows) {
  std::string text;
  for (const ModelRow& row : rows) {
    Json json = to_json(model, row);
    json.erase("samples_ns");
    json.erase("samples_ts");
    std::vector<std::string> names, values;
    for (const auto& [name, value] : json.items()) {
      names.push_back(name);
      values.push_back(csv_field(value));
    }
    if (text.empty()) text = fmt::format("{}\n", fmt::join(names, ","));
    text += fmt::format("{}\n", fmt::join(values, ","));
  }
  return text;
}

std::string json_text(const BenchedModel& model, const std::vector<ModelRow>& rows) {
  auto list = Json::array();
  for (const ModelRow& row : rows) list.push_back(to_json(model, row));
  return list.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace moba::app
