#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "moba/error.h"

namespace moba {

/// Internal: "argument: expected X, got Y", without the name of the public function, which `named` adds.
struct ArgumentError {
  std::string message;
};

/// Throws ArgumentError: `parts` are concatenated to "expected X, got Y".
template <typename... Parts>
[[noreturn]] void refuse(std::string_view argument, const Parts&... parts) {
  std::string message(argument);
  message += ": ";
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(part)>>) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (add(parts), ...);
  throw ArgumentError{std::move(message)};
}

/// Internal: the end of a cancelled call, without the name of the public function.
struct Cancellation {};

/// Internal: a failure of the device, without the name of the public function.
struct DeviceFailure {
  std::string message;
};

/// Runs the body of a public function. An ArgumentError leaves it as Error "function: argument: expected X,
/// got Y", a DeviceFailure as DeviceError "function: message", a Cancellation as Cancelled "function:
/// cancelled".
template <typename Body>
decltype(auto) named(std::string_view function, Body&& body) {
  try {
    return body();
  } catch (const ArgumentError& error) {
    throw Error(std::string(function) + ": " + error.message);
  } catch (const Cancellation&) {
    throw Cancelled(std::string(function) + ": cancelled");
  } catch (const DeviceFailure& failure) {
    throw DeviceError(std::string(function) + ": " + failure.message);
  }
}

}  // namespace moba
