#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace moba::llm {

using Sha256Digest = std::array<std::uint8_t, 32>;

/// Returns 64 hexadecimal digits.
std::string hex(const Sha256Digest& digest);

/// SHA-256 of bytes that are added in parts, by OpenSSL's libcrypto.
class Sha256 {
 public:
  Sha256();

  Sha256& add(std::span<const std::byte> bytes);
  Sha256& add(std::string_view text) { return add(std::as_bytes(std::span(text))); }
  /// Returns the digest. Ends the use of the object.
  Sha256Digest finish();

 private:
  struct Delete {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, Delete> context_;
};

}  // namespace moba::llm
