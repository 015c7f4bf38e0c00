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

/// The folder of a run: its checkpoints `step-00000100`, each a Hugging Face folder with what training needs
/// to go on; `last`, a link to the newest; and links to the files of that, so that the folder of a run is a
/// model too.
class Checkpoints {
 public:
  explicit Checkpoints(std::filesystem::path folder) : folder_(std::move(folder)) {}

  /// The newest, if there is one. What is there is whole: it got its name when all was on disk.
  std::optional<std::filesystem::path> newest() const;
  std::int64_t count() const;

  /// `write` fills a folder, which then becomes the checkpoint of `step`; all but the last `keep` go. Throws
  /// DataError, and leaves the others as they were.
  void save(std::int64_t step, std::int64_t keep,
            const std::function<void(const std::filesystem::path&)>& write) const;

  /// Removes what an interrupted save() has left.
  void tidy() const;

 private:
  std::vector<std::filesystem::path> all() const;

  std::filesystem::path folder_;
};

/// Numbers known by the names of a layout's tensors: a section of the optimiser's file.
struct Section {
  std::string name;
  const Layout* layout;
  std::span<float> values;
};

void write_sections(const std::filesystem::path& path, const std::vector<Section>& sections);
/// Throws DataError for a file that is not whole or has other tensors.
void read_sections(const std::filesystem::path& path, const std::vector<Section>& sections);

}  // namespace moba::llm::train
