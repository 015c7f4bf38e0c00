#include "llm/formats/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "llm/error.h"

namespace moba::llm {

void fail_to_write(const std::filesystem::path& path) {
  throw DataError(fmt::format("{}: expected a writable file, got {}", path.string(),
                              std::generic_category().message(errno)));
}

OutputFile::OutputFile(const std::filesystem::path& path)
    : path_(path), file_(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (file_ < 0) fail_to_write(path_);
}

OutputFile::~OutputFile() {
  if (file_ >= 0) close(file_);
}

void OutputFile::write(const void* bytes, std::size_t count) {
  constexpr std::size_t kMax = std::size_t{1} << 30;  // of one call; Linux's limit is slightly higher
  const auto* next = static_cast<const char*>(bytes);
  while (count > 0) {
    const ssize_t written = ::write(file_, next, std::min(count, kMax));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_to_write(path_);
    next += written;
    count -= static_cast<std::size_t>(written);
  }
}

void OutputFile::finish() {
  if (fsync(file_) != 0) fail_to_write(path_);
  const int file = file_;
  file_ = -1;
  if (close(file) != 0) fail_to_write(path_);
}

void write_file(const std::filesystem::path& path, std::string_view text) {
  OutputFile file(path);
  file.write(text);
  file.finish();
}

void replace_file(const std::filesystem::path& path, std::string_view text) {
  const std::filesystem::path unfinished = path.string() + ".tmp";
  write_file(unfinished, text);
  if (std::rename(unfinished.c_str(), path.c_str()) != 0) fail_to_write(path);
}

void sync_folder(const std::filesystem::path& folder) {
  const int file = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (file < 0) fail_to_write(folder);
  const int failed = fsync(file);
  close(file);
  if (failed != 0) fail_to_write(folder);
}

}  // namespace moba::llm
