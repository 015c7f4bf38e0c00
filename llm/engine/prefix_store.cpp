#include "llm/engine/prefix_store.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <system_error>
#include <utility>

#include "llm/error.h"
#include "llm/formats/fingerprint.h"
#include "llm/formats/output_file.h"

namespace moba::llm {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kExtension = ".page", kUnfinished = ".tmp";
/// Unfinished files of a process that was killed.
constexpr std::chrono::hours kAbandoned{1};

/// What follows the page in its file; then its tokens and the checksum of all before.
struct Trailer {
  std::array<char, 8> magic{'M', 'O', 'B', 'A', 'P', 'A', 'G', 'E'};
  std::uint32_t version = 1, tokens = 0;
  std::uint64_t page_bytes = 0;
  PrefixStore::Key parent{}, key{};
};
static_assert(sizeof(Trailer) == 88);

std::string_view bytes_of(const void* data, std::size_t size) {
  return {static_cast<const char*>(data), size};
}

std::string trailer_of(const PrefixStore::Key& parent, const PrefixStore::Key& key,
                       std::span<const std::int32_t> tokens, const std::byte* page, std::size_t page_bytes) {
  Trailer trailer;
  trailer.tokens = static_cast<std::uint32_t>(tokens.size());
  trailer.page_bytes = page_bytes;
  trailer.parent = parent;
  trailer.key = key;
  std::string text(bytes_of(&trailer, sizeof(trailer)));
  text += bytes_of(tokens.data(), tokens.size_bytes());
  Fingerprint checksum;
  checksum.add(bytes_of(page, page_bytes));
  checksum.add(text);
  return text + checksum.text();
}

std::optional<PrefixStore::Key> key_of(const fs::path& file) {
  PrefixStore::Key key{};
  const std::string name = file.stem().string();
  if (file.extension() != kExtension || name.size() != 2 * key.size()) return std::nullopt;
  for (std::size_t i = 0; i < name.size(); ++i) {
    const std::size_t digit = std::string_view("0123456789abcdef").find(name[i]);
    if (digit == std::string_view::npos) return std::nullopt;
    key[i / 2] = static_cast<std::uint8_t>(key[i / 2] << 4 | digit);
  }
  return key;
}

/// Reads exactly `size` bytes. Returns false if there are fewer.
bool read_bytes(int file, void* to, std::size_t size) {
  auto* next = static_cast<char*>(to);
  while (size > 0) {
    const ssize_t count = ::read(file, next, std::min(size, std::size_t{1} << 30));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    next += count;
    size -= static_cast<std::size_t>(count);
  }
  return true;
}

struct OpenFile {
  explicit OpenFile(const fs::path& path) : number(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~OpenFile() {
    if (number >= 0) close(number);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  int number;
};

/// Locks a file that is read against removal, until it is closed. A file system without locks has no
/// protection.
bool is_being_removed(const OpenFile& file) {
  return flock(file.number, LOCK_SH | LOCK_NB) != 0 && errno == EWOULDBLOCK;
}
bool is_being_read(const OpenFile& file) {
  return flock(file.number, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
}

void set_time(const fs::path& path, PrefixStore::Time time) {
  const auto since = time.time_since_epoch();
  const auto seconds = std::chrono::floor<std::chrono::seconds>(since);
  const timespec unchanged{.tv_sec = 0, .tv_nsec = UTIME_OMIT},
      changed{.tv_sec = seconds.count(), .tv_nsec = (since - seconds).count()};
  const timespec times[2] = {unchanged, changed};
  utimensat(AT_FDCWD, path.c_str(), times, 0);  // may fail: the file counts as older or newer
}

}  // namespace

PrefixStore::Key PrefixStore::next(const Key& parent, std::span<const std::int32_t> tokens) {
  return Sha256().add(std::as_bytes(std::span(parent))).add(std::as_bytes(tokens)).finish();
}

PrefixStore::PrefixStore(Settings settings) : settings_(std::move(settings)) {
  std::error_code error;
  fs::create_directories(settings_.folder, error);
  if (!error) {
    const auto now = fs::file_time_type::clock::now();
    for (fs::directory_iterator entry(settings_.folder, error), end; !error && entry != end;
         entry.increment(error)) {
      if (const auto key = key_of(entry->path())) known_.insert(*key);
      std::error_code ignored;
      if (entry->path().extension() == kUnfinished && now - entry->last_write_time(ignored) > kAbandoned)
        fs::remove(entry->path(), ignored);
    }
  }
  if (error) {
    throw DataError(fmt::format("{}: expected a folder, got {}", settings_.folder.string(), error.message()));
  }
  thread_ = std::thread([this] { run(); });
}

PrefixStore::~PrefixStore() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

fs::path PrefixStore::path_of(const Key& key) const {
  return settings_.folder / (hex(key) + std::string(kExtension));
}

bool PrefixStore::contains(const Key& key) {
  {
    const std::lock_guard lock(mutex_);
    if (known_.contains(key)) return true;
    if (damaged_.contains(key)) return false;
  }
  if (access(path_of(key).c_str(), R_OK) != 0) return false;  // another process may have written it
  const std::lock_guard lock(mutex_);
  known_.insert(key);
  return true;
}

std::int64_t PrefixStore::pages() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::int64_t>(known_.size()) - pending_pages_;
}

bool PrefixStore::read(const Key& parent, std::span<const std::int32_t> tokens, std::byte* page) {
  const Key key = next(parent, tokens);
  const fs::path path = path_of(key);
  const OpenFile file(path);
  const bool is_there = file.number >= 0 && !is_being_removed(file);
  if (is_there) {
    const bool is_whole = read_bytes(file.number, page, settings_.page_bytes);
    const std::string expected =
        is_whole ? trailer_of(parent, key, tokens, page, settings_.page_bytes) : std::string();
    std::string found(expected.size() + 1, '\0');
    const ssize_t size = is_whole ? ::read(file.number, found.data(), found.size()) : -1;
    if (size == static_cast<ssize_t>(expected.size()) && found.starts_with(expected)) return true;
    if (settings_.warn)
      settings_.warn(
          fmt::format("{}: expected a page of this cache, got another content; ignored", path.string()));
  }
  const std::lock_guard lock(mutex_);
  known_.erase(key);
  if (is_there) damaged_.insert(key);
  return false;
}

bool PrefixStore::write(const Key& parent, std::span<const std::int32_t> tokens, const Page& page,
                        Time used) {
  const Key key = next(parent, tokens);
  {
    const std::lock_guard lock(mutex_);
    if (known_.contains(key)) return true;
    if (unreleased_ >= settings_.max_pending) return false;
    known_.insert(key);
    ++unreleased_;
    ++pending_pages_;
    pending_.push_back({parent, key, {tokens.begin(), tokens.end()}, page, used});
  }
  changed_.notify_one();
  return true;
}

void PrefixStore::use(std::span<const Key> keys, Time time) {
  {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 1; i < keys.size(); ++i) {
      if (known_.contains(keys[i]))
        pending_.push_back({.key = keys[i], .used = time_of_page(time, static_cast<std::int64_t>(i) - 1)});
    }
  }
  changed_.notify_one();
}

void PrefixStore::release_written() {
  std::vector<Page> written;
  const std::lock_guard lock(mutex_);
  written.swap(written_);
  unreleased_ -= written.size();
}

void PrefixStore::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return is_stopping_ || !pending_.empty(); });
    if (pending_.empty()) return;
    const Job& job = pending_.front();  // stays until it is done
    lock.unlock();
    bool is_stored = true;
    if (job.page) {
      is_stored = store(job);
    } else {
      set_time(path_of(job.key), job.used);
    }
    lock.lock();
    if (!is_stored) known_.erase(job.key);
    if (is_stored && job.page) damaged_.erase(job.key);
    if (job.page) {
      written_.push_back(std::move(pending_.front().page));
      --pending_pages_;
    }
    pending_.pop_front();
  }
}

/// Returns the pages in the folder, those of other models and processes included.
std::vector<PrefixStore::File> PrefixStore::scan() {
  std::vector<File> files;
  folder_bytes_ = written_bytes_ = 0;
  is_scanned_ = true;
  std::error_code error;
  for (fs::directory_iterator entry(settings_.folder, error), end; !error && entry != end;
       entry.increment(error)) {
    struct stat status {};
    if (!key_of(entry->path()) || stat(entry->path().c_str(), &status) != 0) continue;
    const auto bytes = static_cast<std::uint64_t>(status.st_size);
    const Time used(std::chrono::seconds(status.st_mtim.tv_sec) +
                    std::chrono::nanoseconds(status.st_mtim.tv_nsec));
    files.push_back({entry->path(), bytes, used});
    folder_bytes_ += bytes;
  }
  return files;
}

/// Removes a page, unless a process reads it.
bool PrefixStore::remove(const File& file) {
  const OpenFile open(file.path);
  if (open.number < 0 || is_being_read(open)) return false;
  std::error_code error;
  if (!fs::remove(file.path, error)) return false;
  const std::lock_guard lock(mutex_);
  if (const auto key = key_of(file.path)) known_.erase(*key);
  return true;
}

/// Lets `bytes` more fit into the folder. Returns false if removing all pages that were used before `used` is
/// not enough.
bool PrefixStore::make_room(std::uint64_t bytes, Time used) {
  constexpr std::uint64_t kScanShare = 16, kRoomShare = 32;  // of the folder
  const std::uint64_t max = settings_.max_bytes;
  if (max == std::numeric_limits<std::uint64_t>::max()) return true;
  if (bytes > max) return false;
  const auto fits = [&] { return folder_bytes_ + written_bytes_ <= max - bytes; };
  // Other processes write, too.
  if (is_scanned_ && fits() && written_bytes_ <= max / kScanShare) return true;
  std::vector<File> files = scan();
  if (fits()) return true;
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.used < b.used; });
  const std::uint64_t goal =
      max - bytes - std::min(max / kRoomShare, max - bytes);  // so that not every page scans
  for (const File& file : files) {
    if (folder_bytes_ <= goal || file.used >= used) break;
    if (remove(file)) folder_bytes_ -= file.bytes;
  }
  return fits();
}

/// Writes a page; returns whether it is in the folder.
bool PrefixStore::store(const Job& job) {
  const fs::path path = path_of(job.key);
  const fs::path unfinished = path.string() + fmt::format(".{}{}", getpid(), kUnfinished);
  try {
    const std::string trailer =
        trailer_of(job.parent, job.key, job.tokens, job.page.get(), settings_.page_bytes);
    const std::uint64_t bytes = settings_.page_bytes + trailer.size();
    if (!make_room(bytes, job.used)) return false;
    OutputFile file(unfinished);
    file.write(job.page.get(), settings_.page_bytes);
    file.write(trailer);
    file.finish();
    set_time(unfinished, job.used);
    fs::rename(unfinished, path);
    written_bytes_ += bytes;
    return true;
  } catch (const std::exception& error) {  // a full disk
    std::error_code ignored;
    fs::remove(unfinished, ignored);
    if (!std::exchange(has_failed_, true) && settings_.warn)
      settings_.warn(fmt::format("{}; pages are not stored while this lasts", error.what()));
    return false;
  }
}

}  // namespace moba::llm
