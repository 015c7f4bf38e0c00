#include "llm/calibrate/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <string_view>

#include "llm/engine/model_fingerprint.h"
#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/formats/output_file.h"
#include "llm/session/session.h"

namespace moba::llm {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::string_view kFormat = "moba calibration";
constexpr std::int64_t kVersion = 1;
constexpr std::uint64_t kMaxBytes = std::uint64_t{64} << 20;
/// Blocks of layers without a block size, where no layer has one.
constexpr std::int64_t kBlockSize = 256;

std::int64_t count_of(const JsonValue& value, std::int64_t low) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const std::int64_t count = value.integer();
  if (count < low || count > kMax) value.fail(fmt::format("{} to {}", low, kMax), std::to_string(count));
  return count;
}

Routing routing_of(const JsonValue& layer) {
  const JsonValue attention = layer.at("attention");
  if (attention.string() == "full") return Routing::full();
  if (attention.string() != "moba") attention.fail("full or moba");
  const Routing routing{.block_size = count_of(layer.at("block_size"), 1),
                        .top_k = count_of(layer.at("top_k"), 1),
                        .sink_blocks = count_of(layer.at("sink"), 0)};
  if (routing.sink_blocks >= routing.top_k) {
    layer.at("sink").fail(fmt::format("fewer than top_k {}", routing.top_k),
                          std::to_string(routing.sink_blocks));
  }
  return routing;
}

Json to_json(const Routing& routing) {
  if (is_full(routing)) return {{"attention", "full"}};
  return {{"attention", "moba"},
          {"block_size", routing.block_size},
          {"top_k", routing.top_k},
          {"sink", routing.sink_blocks}};
}

}  // namespace

std::vector<Routing> with_blocks_of_full(std::vector<Routing> layers) {
  std::int64_t longest = 0;
  for (const Routing& routing : layers) {
    if (!is_full(routing)) longest = std::max(longest, routing.block_size);
  }
  for (Routing& routing : layers) {
    if (is_full(routing)) routing.block_size = longest > 0 ? longest : kBlockSize;
  }
  return layers;
}

Calibration read_calibration(const fs::path& path, const std::string& model, const Weights& weights) {
  const nlohmann::json document = load_json(path, kMaxBytes);
  const JsonValue root(document, path.string());
  const JsonValue format = root.at("format"), version = root.at("version");
  if (format.string() != kFormat) format.fail(fmt::format("\"{}\"", kFormat));
  if (version.integer() != kVersion) {
    version.fail(
        fmt::format("{}", kVersion),
        fmt::format("{}{}", version.integer(),
                    version.integer() > kVersion ? ", which a later version of moba has written" : ""));
  }
  Calibration calibration;
  calibration.model = root.at("model").string();
  const JsonValue fingerprint = root.at("fingerprint");
  calibration.fingerprint = fingerprint.string();
  if (calibration.fingerprint != weights_fingerprint(weights))
    fingerprint.fail(fmt::format("that of {}", model), fmt::format("that of another {}", calibration.model));
  calibration.full_tail = count_of(root.at("full_tail"), 0);
  const JsonValue layers = root.at("layers");
  const auto count = static_cast<std::int64_t>(layers.array().size());
  if (count != weights.config().layers)
    layers.fail(fmt::format("{} layers", weights.config().layers), std::to_string(count));
  for (std::size_t i = 0; i < layers.array().size(); ++i)
    calibration.layers.push_back(routing_of(layers.element(i)));
  calibration.layers = with_blocks_of_full(std::move(calibration.layers));
  if (const auto measured = root.find("measured")) calibration.measured = measured->value();
  return calibration;
}

void write_calibration(const fs::path& path, const Calibration& calibration) {
  Json json{{"format", kFormat},
            {"version", kVersion},
            {"model", calibration.model},
            {"fingerprint", calibration.fingerprint},
            {"full_tail", calibration.full_tail},
            {"layers", Json::array()},
            {"measured", calibration.measured}};
  for (const Routing& routing : calibration.layers) json["layers"].push_back(to_json(routing));
  replace_file(path, json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

fs::path calibration_beside(const fs::path& model) {
  if (fs::is_directory(model)) return model / "model.moba.json";
  return fs::path(model).replace_extension(".moba.json");
}

}  // namespace moba::llm
