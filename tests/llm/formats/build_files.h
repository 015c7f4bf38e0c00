#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "llm/error.h"
#include "llm/formats/gguf.h"

namespace moba::llm {

/// Test with a temporary folder of its own.
class WithFolder : public ::testing::Test {
 protected:
  WithFolder() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              (std::string("moba-") + test->name() + "-" + std::to_string(getpid()));
    std::filesystem::create_directories(folder_);
  }
  ~WithFolder() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path write(const std::string& name, std::string_view bytes) const {
    std::filesystem::remove(folder_ / name);  // faster than overwriting it
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }

  std::filesystem::path folder_;
};

/// Returns the error message of `action`, empty if it does not throw.
inline std::string complaint_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const DataError& error) {
    return error.what();
  }
  return "";
}

template <typename T>
std::string bytes_of(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

inline std::string gguf_string(std::string_view text) {
  return bytes_of(static_cast<std::uint64_t>(text.size())) + std::string(text);
}

/// Builds the bytes of a GGUF file, valid or not.
class GgufText {
 public:
  GgufText& entry(std::string_view key, GgufType type, const std::string& value) {
    metadata_ += gguf_string(key) + bytes_of(static_cast<std::uint32_t>(type)) + value;
    ++entries_;
    return *this;
  }
  GgufText& text(std::string_view key, std::string_view value) {
    return entry(key, GgufType::string, gguf_string(value));
  }
  GgufText& u32(std::string_view key, std::uint32_t value) {
    return entry(key, GgufType::u32, bytes_of(value));
  }
  GgufText& f32(std::string_view key, float value) { return entry(key, GgufType::f32, bytes_of(value)); }
  GgufText& array(std::string_view key, GgufType element, std::uint64_t count, const std::string& elements) {
    return entry(key, GgufType::array,
                 bytes_of(static_cast<std::uint32_t>(element)) + bytes_of(count) + elements);
  }

  /// Adds a tensor of zeros, with the bytes of an F32 one; `shape` has the outermost dimension first.
  GgufText& tensor(std::string_view name, const std::vector<std::int64_t>& shape, std::uint32_t type = 0) {
    std::uint64_t count = 1;
    tensors_ += gguf_string(name) + bytes_of(static_cast<std::uint32_t>(shape.size()));
    for (auto size = shape.rbegin(); size != shape.rend(); ++size) {
      tensors_ += bytes_of(static_cast<std::uint64_t>(*size));
      count *= static_cast<std::uint64_t>(*size);
    }
    tensors_ += bytes_of(type) + bytes_of(data_bytes_);
    data_bytes_ += (count * 4 + 31) / 32 * 32;
    ++count_;
    return *this;
  }

  std::string str(std::uint32_t version = 3) const {
    std::string file =
        "GGUF" + bytes_of(version) + bytes_of(count_) + bytes_of(entries_) + metadata_ + tensors_;
    file.resize((file.size() + 31) / 32 * 32 + data_bytes_);
    return file;
  }

 private:
  std::string metadata_, tensors_;
  std::uint64_t entries_ = 0, count_ = 0, data_bytes_ = 0;
};

/// Calls `read` on the file cut at every length, which must throw DataError, and with every byte changed in
/// three ways, which must load or throw DataError.
inline void expect_survival(const std::string& good, const std::function<void(const std::string&)>& read) {
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_NE(complaint_of([&] { read(good.substr(0, size)); }), "") << "cut at " << size;
  }
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int change : {0x01, 0x80, 0xFF}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ change);
      complaint_of([&] { read(bad); });
    }
  }
}

}  // namespace moba::llm
