#pragma once

#include <stdexcept>
#include <string>

#include "moba/export.h"

namespace moba {

/// Thrown at the door, before any work is done and before anything is written. The message names the
/// function, the argument, what was expected and what was found.
class MOBA_EXPORT Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A device failed a call whose arguments were right: no memory, no launch. What the call writes is
/// undefined.
class MOBA_EXPORT DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moba
