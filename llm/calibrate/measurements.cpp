#include "llm/calibrate/measurements.h"

#include <nlohmann/json.hpp>

#include "llm/formats/json.h"
#include "llm/formats/output_file.h"

namespace moba::llm {
namespace {

namespace fs = std::filesystem;
constexpr std::uint64_t kMaxBytes = std::uint64_t{64} << 20;

}  // namespace

Score& Score::operator+=(const Score& other) {
  loss += other.loss;
  divergence += other.divergence;
  agreement += other.agreement;
  tokens += other.tokens;
  return *this;
}

Measurements::Measurements(fs::path path, std::string key) : path_(std::move(path)), key_(std::move(key)) {
  if (!fs::exists(path_)) return;
  const nlohmann::json document = load_json(path_, kMaxBytes);
  const JsonValue root(document, path_.string());
  if (root.at("key").string() != key_) return;
  const JsonValue sensitivities = root.at("sensitivities"), scores = root.at("scores");
  for (std::size_t i = 0; i < sensitivities.array().size(); ++i) {
    const JsonValue entry = sensitivities.element(i), layers = entry.at("layers");
    Sensitivities& values = sensitivities_[static_cast<std::size_t>(entry.at("sequence").integer())];
    for (std::size_t l = 0; l < layers.array().size(); ++l) {
      std::vector<double>& of_layer = values.emplace_back();
      const JsonValue candidates = layers.element(l);
      for (std::size_t c = 0; c < candidates.array().size(); ++c)
        of_layer.push_back(candidates.element(c).number());
    }
  }
  for (std::size_t i = 0; i < scores.array().size(); ++i) {
    const JsonValue entry = scores.element(i);
    put(static_cast<std::size_t>(entry.at("sequence").integer()), entry.at("attention").string(),
        {.loss = entry.at("loss").number(),
         .divergence = entry.at("divergence").number(),
         .agreement = entry.at("agreement").number(),
         .tokens = entry.at("tokens").integer()});
  }
}

const Measurements::Sensitivities* Measurements::sensitivities(std::size_t sequence) const {
  const auto found = sensitivities_.find(sequence);
  return found == sensitivities_.end() ? nullptr : &found->second;
}

void Measurements::put(std::size_t sequence, Sensitivities sensitivities) {
  sensitivities_[sequence] = std::move(sensitivities);
}

const Score* Measurements::score(std::size_t sequence, const std::string& attention) const {
  const auto found = scores_.find({sequence, attention});
  return found == scores_.end() ? nullptr : &found->second;
}

void Measurements::put(std::size_t sequence, const std::string& attention, const Score& score) {
  scores_[{sequence, attention}] = score;
}

void Measurements::save() const {
  nlohmann::ordered_json json{
      {"key", key_}, {"sensitivities", nlohmann::json::array()}, {"scores", nlohmann::json::array()}};
  for (const auto& [sequence, layers] : sensitivities_)
    json["sensitivities"].push_back({{"sequence", sequence}, {"layers", layers}});
  for (const auto& [of, score] : scores_) {
    json["scores"].push_back({{"sequence", of.first},
                              {"attention", of.second},
                              {"loss", score.loss},
                              {"divergence", score.divergence},
                              {"agreement", score.agreement},
                              {"tokens", score.tokens}});
  }
  replace_file(path_, json.dump() + "\n");
}

void Measurements::discard() const {
  std::error_code ignored;
  fs::remove(path_, ignored);
}

}  // namespace moba::llm
