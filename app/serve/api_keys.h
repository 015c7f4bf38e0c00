#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace moba::app {

/// The keys that a server accepts; none: it asks for none.
class ApiKeys {
 public:
  ApiKeys() = default;
  explicit ApiKeys(std::vector<std::string> keys) : keys_(std::move(keys)) {}
  /// Reads keys from a file, one a line. Throws DataError for a file without a key.
  static ApiKeys read(const std::string& path);

  bool required() const { return !keys_.empty(); }
  /// Returns whether the value of the header field Authorization, "Bearer KEY", holds one of the keys. The
  /// time does not depend on where a wrong key differs.
  bool accepts(std::string_view authorization) const;

 private:
  std::vector<std::string> keys_;
};

}  // namespace moba::app
