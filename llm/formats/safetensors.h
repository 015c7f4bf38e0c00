#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "llm/formats/mapped_file.h"
#include "llm/formats/tensor.h"

namespace moba::llm {

/// A safetensors file of f32, f16 and bf16 tensors, in file order. Opening reads the header only, and checks
/// that the tensors fill the rest of the file without gap or overlap, as the format demands. The tensors are
/// valid as long as a copy of `file`.
struct SafetensorsFile {
  /// Throws DataError.
  static SafetensorsFile open(const std::filesystem::path& path);

  std::shared_ptr<const MappedFile> file;
  std::vector<StoredTensor> tensors;
};

}  // namespace moba::llm
