#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "llm/formats/weights.h"
#include "moba/attention.h"

namespace moba::llm {

/// The attention of a model that was not trained with MoBA, as `moba calibrate` found it: the content of a
/// .moba.json file.
struct Calibration {
  /// The name of the model, for people, and its fingerprint().
  std::string model, fingerprint;
  /// The routing of each layer, top_k kEverything where it is full.
  std::vector<Routing> layers;
  /// Last tokens of a prompt that are read with full attention.
  std::int64_t full_tail = 0;
  /// The figures that the choice rests on. Not read again.
  nlohmann::ordered_json measured;
};

/// Reads a calibration of this model, `model` being the path it was opened from. Throws DataError for a file
/// that is damaged, of a newer version or of another model.
Calibration read_calibration(const std::filesystem::path& path, const std::string& model,
                             const Weights& weights);
/// Writes a file that read_calibration() accepts; it appears under its name when it is complete. Throws
/// DataError.
void write_calibration(const std::filesystem::path& path, const Calibration& calibration);

/// Gives full layers the longest blocks of the others, so that they do not lengthen the pages of a cache.
std::vector<Routing> with_blocks_of_full(std::vector<Routing> layers);

/// Returns the file that belongs to a model: "x.moba.json" beside "x.gguf", "model.moba.json" in a folder.
std::filesystem::path calibration_beside(const std::filesystem::path& model);

}  // namespace moba::llm
