#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace moba::llm {

/// A memory-mapped file, valid as long as this object.
class MappedFile {
 public:
  /// Throws DataError for a file that cannot be opened or is not a regular file.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& name() const { return name_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::string name_;
  std::span<const std::byte> bytes_;
};

}  // namespace moba::llm
