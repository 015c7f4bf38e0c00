#include "app/serve/service.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "app/serve/completion.h"
#include "app/serve/content_security_policy.h"
#include "app/serve/http_server.h"
#include "app/serve/metrics.h"
#include "app/serve/openai_request.h"
#include "app/serve/openai_response.h"
#include "app/serve/page.h"
#include "llm/session/text_stream.h"

namespace moba::app {
namespace {

enum class Endpoint { page, chat, completions, models, model, tokenize, detokenize, health, metrics };

struct Route {
  Endpoint endpoint;
  const char *method, *path;
};
constexpr std::string_view kModels = "/v1/models/";
constexpr Route kRoutes[] = {
    {Endpoint::page, "GET", "/"},
    {Endpoint::chat, "POST", "/v1/chat/completions"},
    {Endpoint::completions, "POST", "/v1/completions"},
    {Endpoint::models, "GET", "/v1/models"},
    {Endpoint::model, "GET", kModels.data()},
    {Endpoint::tokenize, "POST", "/tokenize"},
    {Endpoint::detokenize, "POST", "/detokenize"},
    {Endpoint::health, "GET", "/health"},
    {Endpoint::metrics, "GET", "/metrics"},
};

bool names_model(const HttpRequest& head) {
  return head.path.starts_with(kModels) && head.path.size() > kModels.size();
}

/// Throws HttpError: 404 or 405.
const Route& route_of(const HttpRequest& head) {
  const auto route = std::find_if(std::begin(kRoutes), std::end(kRoutes), [&](const Route& r) {
    return r.endpoint == Endpoint::model ? names_model(head) : head.path == r.path;
  });
  if (route == std::end(kRoutes)) throw HttpError(404, "path: expected an endpoint, got " + head.path);
  if (head.method != route->method) {
    throw HttpError(405, fmt::format("method: expected {}, got {}", route->method, head.method),
                    {.fields = {{"Allow", route->method}}});
  }
  return *route;
}

/// Returns the value of the field Host without its port.
std::string host_of(const HttpRequest& head) {
  if (head.host.starts_with('['))
    return head.host.substr(1, std::max<std::size_t>(head.host.find(']'), 1) - 1);
  return head.host.substr(0, head.host.find(':'));
}

OrderedJson model_json(const ServedModel& model) {
  return {{"id", model.name},
          {"object", "model"},
          {"created", model.created},
          {"owned_by", "moba"},
          {"max_model_len", model.context}};
}

}  // namespace

Service::Service(const ServedModel& model, EngineThread& engine, AccessSettings access)
    : model_(model), engine_(engine), access_(std::move(access)) {}

/// Throws HttpError for a client that may not ask.
void Service::check_access(const HttpRequest& head) const {
  if (!access_.keys.accepts(head.authorization)) {
    throw HttpError(401, "Authorization: expected 'Bearer' and an API key, got another value",
                    {.code = "invalid_api_key", .fields = {{"WWW-Authenticate", "Bearer"}}});
  }
  if (access_.keys.required()) return;
  if (access_.local_hosts_only && !head.host.empty() && !is_loopback(host_of(head)))
    throw HttpError(403, "Host: expected a name of this machine, got " + head.host);
  if (!head.origin.empty() && head.origin != "http://" + head.host && head.origin != access_.cors_origin)
    throw HttpError(403, "Origin: expected the server's own, got " + head.origin);
}

std::optional<HttpResponse> Service::check(const HttpRequest& head) const {
  try {
    if (access_.cors_origin && head.method == "OPTIONS") {
      return HttpResponse{.status = 204,
                          .fields = {{"Access-Control-Allow-Methods", "GET, POST"},
                                     {"Access-Control-Allow-Headers", "Authorization, Content-Type"}}};
    }
    if (head.path != "/health" && head.path != "/") check_access(head);
    const Endpoint endpoint = route_of(head).endpoint;
    if (is_stopping_ && (endpoint == Endpoint::chat || endpoint == Endpoint::completions))
      throw HttpError(503, "the server is stopping");
    return std::nullopt;
  } catch (const HttpError& error) {
    return error_response(error);
  }
}

HttpReply Service::handle(const HttpRequest& request) {
  switch (route_of(request).endpoint) {
    case Endpoint::page:
      return page();
    case Endpoint::chat:
      return start_completion(chat_request(parse_body(request.body), model_), model_, engine_);
    case Endpoint::completions:
      return start_completion(completion_request(parse_body(request.body), model_), model_, engine_);
    case Endpoint::models:
      return models();
    case Endpoint::model:
      if (request.path.substr(kModels.size()) != model_.name) {
        throw HttpError(404, fmt::format("model: expected {}, got another", model_.name),
                        {.param = "model", .code = "model_not_found"});
      }
      return HttpResponse{.body = dump(model_json(model_))};
    case Endpoint::tokenize: {
      OrderedJson json;
      json["tokens"] = tokenize_request(parse_body(request.body), model_);
      return HttpResponse{.body = dump(json)};
    }
    case Endpoint::detokenize: {
      llm::TextStream stream;  // completes characters
      const std::vector<std::int32_t> tokens = detokenize_request(parse_body(request.body), model_);
      OrderedJson json;
      json["content"] = stream.push(model_.tokenizer.decode(tokens, /*show_special=*/true));
      json["content"].get_ref<std::string&>() += stream.finish();
      return HttpResponse{.body = dump(json)};
    }
    case Endpoint::health:
      return health();
    case Endpoint::metrics:
      return metrics();
  }
  throw HttpError(404, "path: expected an endpoint, got " + request.path);
}

/// The page asks for a key itself, so it needs none.
HttpResponse Service::page() {
  static const std::string policy = content_security_policy(kPage);
  return {.body = kPage,
          .content_type = "text/html; charset=utf-8",
          .fields = {{"Content-Security-Policy", policy},
                     {"X-Content-Type-Options", "nosniff"},
                     {"Referrer-Policy", "no-referrer"},
                     {"Cache-Control", "no-cache"}}};
}

HttpResponse Service::health() const {
  const std::string error = is_stopping_ ? "the server is stopping" : engine_.error();
  if (!error.empty()) throw HttpError(503, error);
  OrderedJson json;
  json["status"] = "ok";
  return {.body = dump(json)};
}

HttpResponse Service::models() const {
  OrderedJson json;
  json["object"] = "list";
  json["data"] = OrderedJson::array({model_json(model_)});
  return {.body = dump(json)};
}

HttpResponse Service::metrics() {
  const std::lock_guard lock(mutex_);
  return {.body = metrics_text(engine_.statistics(), responses_),
          .content_type = "text/plain; version=0.0.4; charset=utf-8"};
}

void Service::count(unsigned status) {
  const std::lock_guard lock(mutex_);
  ++responses_[status];
}

}  // namespace moba::app
