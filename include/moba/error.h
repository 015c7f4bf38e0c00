#pragma once

#include <stdexcept>
#include <string>

#include "moba/export.h"

namespace moba {

/// A bad argument. Thrown before any work is done and before anything is written. The message reads
/// "function: argument: expected X, got Y".
class MOBA_EXPORT Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The caller cancelled the call (Execution::cancelled). The contents of the outputs are undefined.
class MOBA_EXPORT Cancelled : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A failure of the device in a call with valid arguments: no memory, no launch. The contents of the outputs
/// are undefined.
class MOBA_EXPORT DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moba
