#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace moba::app {

struct HttpRequest {
  std::string method;
  /// The target without its query.
  std::string path;
  std::string authorization, host, origin;
  std::string body;
};

struct HttpResponse {
  unsigned status = 200;
  std::string body{};
  std::string content_type = "application/json";
  /// Further header fields.
  std::vector<std::pair<std::string, std::string>> fields{};
};

/// A response that other threads make. Its destruction abandons the work.
class PendingResponse {
 public:
  struct Part {
    /// The whole response, instead of a stream.
    std::optional<HttpResponse> whole{};
    /// The next bytes of a stream of server-sent events.
    std::string events{};
    bool is_last = false;
  };

  virtual ~PendingResponse() = default;
  /// Sets what is called, by any thread, when next() has more.
  virtual void on_ready(std::function<void()> ready) = 0;
  /// Returns what is ready: nothing, bytes of a stream, or the whole.
  virtual Part next() = 0;
};

using HttpReply = std::variant<HttpResponse, std::unique_ptr<PendingResponse>>;

/// A request that is refused, with the members of OpenAI's error object.
class HttpError : public std::runtime_error {
 public:
  struct Details {
    std::string param{}, code{};
    std::vector<std::pair<std::string, std::string>> fields{};
  };
  HttpError(unsigned code, const std::string& message) : HttpError(code, message, {}) {}
  HttpError(unsigned code, const std::string& message, Details about)
      : std::runtime_error(message), status(code), details(std::move(about)) {}

  unsigned status;
  Details details;
};

/// Returns OpenAI's error object as JSON.
std::string error_json(const HttpError& error);
HttpResponse error_response(const HttpError& error);

}  // namespace moba::app
