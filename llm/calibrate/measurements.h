#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace moba::llm {

/// Sums over the scored tokens of sequences.
struct Score {
  double loss = 0, divergence = 0, agreement = 0;
  std::int64_t tokens = 0;

  Score& operator+=(const Score& other);
  double mean_loss() const { return loss / static_cast<double>(tokens); }
  double mean_divergence() const { return divergence / static_cast<double>(tokens); }
  double mean_agreement() const { return agreement / static_cast<double>(tokens); }
};

/// The figures that a calibration has measured, kept in a file so that one that was interrupted goes on.
class Measurements {
 public:
  using Sensitivities = std::vector<std::vector<double>>;  // [layers][candidates]

  /// `key` names what the figures depend on: those of another key are ignored. Throws DataError for a file
  /// that is no such file.
  Measurements(std::filesystem::path path, std::string key);

  const Sensitivities* sensitivities(std::size_t sequence) const;
  void put(std::size_t sequence, Sensitivities sensitivities);
  /// The score of a sequence under an attention that has this name.
  const Score* score(std::size_t sequence, const std::string& attention) const;
  void put(std::size_t sequence, const std::string& attention, const Score& score);

  /// Writes the file; throws DataError.
  void save() const;
  /// Deletes the file.
  void discard() const;

 private:
  std::filesystem::path path_;
  std::string key_;
  std::map<std::size_t, Sensitivities> sensitivities_;
  std::map<std::pair<std::size_t, std::string>, Score> scores_;
};

}  // namespace moba::llm
