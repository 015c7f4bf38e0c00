/// Registration of operators, and the name that begins their errors.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

#include "moba/error.h"
#include "src/errors.h"

namespace moba::pytorch {

/// Message of the last argument error on this thread. torch may raise any C++ exception as RuntimeError; by
/// this message the Python package finds those that are a ValueError.
inline thread_local std::string last_argument_error;

/// Returns the message of an error of libmoba, "function: message", without the function's name.
inline std::string without_function(std::string_view message) {
  return std::string(message.substr(message.find(": ") + 2));
}

/// Runs the body of the operator `name`. Errors of arguments leave it as Error "name: argument: expected X,
/// got Y", failures of the device as DeviceError "name: message"; libmoba's own get the operator's name.
template <typename Body>
auto named_operator(std::string_view name, const Body& body) {
  try {
    return named(name, [&] {
      try {
        return body();
      } catch (const Error& error) {
        throw ArgumentError{without_function(error.what())};
      } catch (const DeviceError& error) {
        throw DeviceFailure{without_function(error.what())};
      }
    });
  } catch (const Error& error) {
    last_argument_error = error.what();
    throw;
  }
}

/// The name of an operator, as a template argument.
template <std::size_t Size>
struct OperatorName {
  char text[Size]{};

  consteval OperatorName(const char (&name)[Size]) { std::copy_n(name, Size, text); }
};

template <OperatorName Name, auto Function>
struct NamedOperator;

template <OperatorName Name, typename Result, typename... Parameters, Result (*Function)(Parameters...)>
struct NamedOperator<Name, Function> {
  static Result call(Parameters... parameters) {
    return named_operator(Name.text, [&] { return Function(std::forward<Parameters>(parameters)...); });
  }
};

/// Registers `Function` as the implementation of the operator `Name`.
template <OperatorName Name, auto Function>
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl(Name.text, TORCH_BOX((&NamedOperator<Name, Function>::call)));
}

}  // namespace moba::pytorch
