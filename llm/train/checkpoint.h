#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "llm/train/layout.h"

namespace moba::llm::train {

/// The folder of a run: its checkpoints `step-00000100`, each a Hugging Face folder and the state of
/// training; `last`, a link to the newest; and links to the files of that, so that the folder of a run is a
/// model, too.
class Checkpoints {
 public:
  explicit Checkpoints(std::filesystem::path folder) : folder_(std::move(folder)) {}

  /// Returns the newest, if there is one. A checkpoint is complete: it gets its name once all is on disk.
  std::optional<std::filesystem::path> newest() const;
  std::int64_t count() const;

  /// Creates the checkpoint of `step`, a folder that `write` fills, and removes all but the last `keep`.
  /// Throws DataError, leaving the others unchanged.
  void save(std::int64_t step, std::int64_t keep,
            const std::function<void(const std::filesystem::path&)>& write) const;

  /// Removes the remains of an interrupted save().
  void tidy() const;

 private:
  std::vector<std::filesystem::path> all() const;

  std::filesystem::path folder_;
};

/// A section of the optimiser's file: a number for every parameter, under the names of the layout.
struct Section {
  std::string name;
  const Layout* layout;
  std::span<float> values;
};

void write_sections(const std::filesystem::path& path, const std::vector<Section>& sections);
/// Throws DataError for an incomplete file or one with other tensors.
void read_sections(const std::filesystem::path& path, const std::vector<Section>& sections);

}  // namespace moba::llm::train
