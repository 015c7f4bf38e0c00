#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "llm/engine/page_pool.h"
#include "llm/engine/sha256.h"

namespace moba::llm {

/// Cached pages in a folder, one file a page, for an engine that starts later. A page's key is the SHA-256 of
/// its tokens and of the key of the page before, which for the first page is that of the way to read it. A
/// file appears under its final name when it is complete, and is read only if its checksum, key and tokens
/// are as expected. A thread of its own writes; the members are for one other thread.
class PrefixStore {
 public:
  struct Settings {
    std::filesystem::path folder;
    std::size_t page_bytes = 0;
    /// Maximum pages that wait to be written. Further ones are not stored.
    std::size_t max_pending = 1;
    /// Receives a line about a file that is ignored, and about the first one that cannot be written, from
    /// either thread.
    std::function<void(const std::string&)> warn{};
  };
  using Key = Sha256Digest;

  /// Creates the folder, and finds the pages in it. Throws DataError.
  explicit PrefixStore(Settings settings);
  /// Waits until all pages are written.
  ~PrefixStore();
  PrefixStore(const PrefixStore&) = delete;
  PrefixStore& operator=(const PrefixStore&) = delete;

  static Key root(std::string_view way_to_read) { return Sha256().add(way_to_read).finish(); }
  static Key next(const Key& parent, std::span<const std::int32_t> tokens);

  /// Returns whether there may be a page with this key.
  bool contains(const Key& key) const;
  /// Reads the page of `tokens` after the page `parent` into `page`. Returns false if it is missing or
  /// invalid.
  bool read(const Key& parent, std::span<const std::int32_t> tokens, std::byte* page);
  /// Queues a page to be written, unless it is there. Its content must not change any more.
  void write(const Key& parent, std::span<const std::int32_t> tokens, const Page& page);
  /// Lets go of pages that are written.
  void release_written();
  /// Returns the number of pages in the folder.
  std::int64_t pages() const;

 private:
  struct Job {
    Key parent, key;
    std::vector<std::int32_t> tokens;
    Page page;
  };

  void run();
  bool store(const Job& job);
  std::filesystem::path path_of(const Key& key) const;

  Settings settings_;
  mutable std::mutex mutex_;  // of what follows, up to the thread
  std::condition_variable changed_;
  std::set<Key> known_;  // written, or pending
  std::deque<Job> pending_;
  std::vector<Page> written_;  // for release_written(): a PagePool is not thread-safe
  std::size_t unreleased_ = 0;
  bool is_stopping_ = false, has_failed_ = false;
  std::thread thread_;
};

}  // namespace moba::llm
