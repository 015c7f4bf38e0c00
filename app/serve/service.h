#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "app/serve/api_keys.h"
#include "app/serve/engine_thread.h"
#include "app/serve/http.h"
#include "app/serve/served_model.h"

namespace moba::app {

/// Who may ask.
struct AccessSettings {
  ApiKeys keys{};
  /// Whether requests without a key must name this machine as their host, so that a web page cannot reach the
  /// server by a name that it has pointed at it.
  bool local_hosts_only = true;
  /// The origin of web pages that may ask besides those of the server itself.
  std::optional<std::string> cors_origin{};
};

/// The endpoints of the server. The members are callable by any thread.
class Service {
 public:
  Service(const ServedModel& model, EngineThread& engine, AccessSettings access);

  /// Returns the response to a request that its head decides.
  std::optional<HttpResponse> check(const HttpRequest& head) const;
  /// Answers a request that check() has let pass. Throws HttpError.
  HttpReply handle(const HttpRequest& request);
  /// Counts a response.
  void count(unsigned status);
  /// Refuses requests for answers from now on.
  void begin_stop() { is_stopping_ = true; }

 private:
  void check_access(const HttpRequest& head) const;
  static HttpResponse page();
  HttpResponse health() const;
  HttpResponse models() const;
  HttpResponse metrics();

  const ServedModel& model_;
  EngineThread& engine_;
  AccessSettings access_;
  std::atomic<bool> is_stopping_ = false;
  std::mutex mutex_;  // of responses_
  std::map<unsigned, std::int64_t> responses_;
};

}  // namespace moba::app
