#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>

namespace moba::llm {

/// Distinguishes contents that differ by accident; not cryptographic. FNV-1a of 64 bits, over words
/// of 8 bytes where there are as many.
class Fingerprint {
 public:
  void add(std::string_view bytes) {
    add_word(bytes.size());
    for (; bytes.size() >= 8; bytes.remove_prefix(8)) {
      std::uint64_t word = 0;
      bytes.copy(reinterpret_cast<char*>(&word), 8);
      add_word(word);
    }
    for (const char c : bytes) add_word(static_cast<unsigned char>(c));
  }

  std::string text() const { return fmt::format("{:016x}", hash_); }

 private:
  void add_word(std::uint64_t word) {
    hash_ = (hash_ ^ word) * 0x100000001B3u;
    hash_ ^= hash_ >> 29;  // the product alone carries upwards only
  }

  std::uint64_t hash_ = 0xCBF29CE484222325u;
};

}  // namespace moba::llm
