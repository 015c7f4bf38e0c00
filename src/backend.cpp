#include "backend.h"

#include <array>
#include <cstdlib>

namespace moba {
namespace {

constexpr std::array kBackends = {&cpu_backend, &reference_backend};

}  // namespace

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const Backend* backend : kBackends) names.emplace_back(backend->name);
  return names;
}

const Backend& choose_backend(const std::string& name, const Problem& problem, std::string_view function) {
  const char* forced = std::getenv("MOBA_BACKEND");
  const bool from_environment = name.empty() && forced != nullptr && *forced != '\0';
  const std::string wanted = from_environment ? forced
                             : name.empty()   ? std::string(kBackends.front()->name)
                                              : name;
  for (const Backend* backend : kBackends) {
    if (backend->name != wanted) continue;
    if (const std::string why = backend->refuses(problem); !why.empty()) {
      throw Error(std::string(function) + ": backend " + wanted + " " + why);
    }
    return *backend;
  }
  std::string known;
  for (const Backend* backend : kBackends) known += (known.empty() ? "" : ", ") + std::string(backend->name);
  throw Error(std::string(function) + ": " + (from_environment ? "MOBA_BACKEND" : "backend") + " is \"" +
              wanted + "\"; this build has " + known);
}

}  // namespace moba
