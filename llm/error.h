#pragma once

#include <stdexcept>

namespace moba::llm {

/// A file that is not what it should be. The message names the file, what was expected and what was found.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A flag or setting that cannot be met. The message names it.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moba::llm
