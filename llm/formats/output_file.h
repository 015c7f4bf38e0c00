#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace moba::llm {

/// Throws DataError for a file or folder that could not be written, with the reason in errno.
[[noreturn]] void fail_to_write(const std::filesystem::path& path);

/// A file that is written from the start and is on disk once finish() has returned. Every member throws
/// DataError where it fails.
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

/// Writes a small file and syncs it to disk.
void write_file(const std::filesystem::path& path, std::string_view text);

/// The same, but the file appears under its name, in place of an older one, when it is complete.
void replace_file(const std::filesystem::path& path, std::string_view text);

/// Syncs a folder to disk: files created, renamed or removed in it.
void sync_folder(const std::filesystem::path& folder);

}  // namespace moba::llm
