#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "app/serve/http.h"

namespace moba::app {

struct HttpSettings {
  std::string host = "127.0.0.1";
  /// 0: a free one.
  std::uint16_t port = 8080;
  std::size_t max_body = std::size_t{32} << 20;
  std::int64_t max_connections = 256;
  /// Seconds in which a client has to send a request, and to take a part of a response.
  double timeout_seconds = 60;
  /// Seconds that responses may still take once the server is told to stop.
  double grace_seconds = 10;
  /// The origin of web pages that may read responses; unset: none but the server's own.
  std::optional<std::string> cors_origin{};
};

/// The application behind a server. The members are called by different threads.
struct HttpHandlers {
  /// Returns the response to a request that is refused before its body is read.
  std::function<std::optional<HttpResponse>(const HttpRequest& head)> check;
  /// Runs on a thread that may take its time. Throws HttpError.
  std::function<HttpReply(const HttpRequest& request)> handle;
  /// Receives the status of every response.
  std::function<void(unsigned status)> count;
  /// The server has been told to stop; requests from now on are to be refused.
  std::function<void()> begin_stop;
  /// The grace has passed: pending responses have to end.
  std::function<void()> abort;
};

/// An HTTP/1.1 server, for which one thread sends and receives and two others handle requests.
class HttpServer {
 public:
  /// Listens. Throws UsageError for an address that cannot be bound.
  HttpServer(const HttpSettings& settings, HttpHandlers handlers);
  ~HttpServer();

  std::uint16_t port() const;
  /// Serves until SIGINT or SIGTERM, or stop(), and then until pending responses have ended.
  void run();
  /// Does what SIGTERM does. Callable by any thread.
  void stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Returns whether an address, or the name localhost, can be reached from this machine only.
bool is_loopback(const std::string& host);

}  // namespace moba::app
