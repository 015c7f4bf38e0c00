#include "app/serve/http.h"

#include <nlohmann/json.hpp>

namespace moba::app {
namespace {

const char* type_of(unsigned status) {
  if (status == 401) return "authentication_error";
  if (status == 429) return "rate_limit_error";
  return status < 500 ? "invalid_request_error" : "server_error";
}

}  // namespace

std::string error_json(const HttpError& error) {
  using Json = nlohmann::ordered_json;
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  Json json;
  json["error"] = {{"message", error.what()},
                   {"type", type_of(error.status)},
                   {"param", or_null(error.details.param)},
                   {"code", or_null(error.details.code)}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

HttpResponse error_response(const HttpError& error) {
  return {.status = error.status, .body = error_json(error), .fields = error.details.fields};
}

}  // namespace moba::app
