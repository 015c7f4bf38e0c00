#pragma once

#include <stdexcept>

namespace moba::llm {

/// An invalid file: "file: expected X, got Y".
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An invalid flag or setting: "--flag: expected X, got Y".
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moba::llm
