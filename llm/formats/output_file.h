#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace moba::llm {

/// A file that is written from the start and is safe on disk once finish() has returned. Whatever fails is a
/// DataError that names the file.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* bytes, std::size_t count);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void finish();

 private:
  std::filesystem::path path_;
  int file_;
};

/// The whole of a small file.
void write_file(const std::filesystem::path& path, std::string_view text);

/// Makes durable what was created, renamed or removed in a folder.
void sync_folder(const std::filesystem::path& folder);

}  // namespace moba::llm
