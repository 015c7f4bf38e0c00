#include "backend.h"

#include <array>
#include <cstdlib>

namespace moba {
namespace {

constexpr std::array kBackends = {&cpu_backend, &reference_backend, &cuda_backend};

}  // namespace

std::vector<std::string> backends() {
  std::vector<std::string> names;
  for (const Backend* backend : kBackends) {
    if (backend->missing.empty()) names.emplace_back(backend->name);
  }
  return names;
}

const Backend& named_backend(const std::string& name, Device device, std::string_view function) {
  const char* forced = std::getenv("MOBA_BACKEND");
  const bool from_environment = name.empty() && forced != nullptr && *forced != '\0';
  const std::string wanted = from_environment         ? forced
                             : !name.empty()          ? name
                             : device == Device::cuda ? "cuda"
                                                      : "cpu";
  const std::string place = std::string(function) + ": " + (from_environment ? "MOBA_BACKEND" : "backend");
  for (const Backend* backend : kBackends) {
    if (backend->name != wanted) continue;
    if (!backend->missing.empty())
      throw Error(std::string(place)
                      .append(" ")
                      .append(wanted)
                      .append(" is not in this build: ")
                      .append(backend->missing));
    return *backend;
  }
  std::string known;
  for (const std::string& built : backends()) known.append(known.empty() ? "" : ", ").append(built);
  throw Error(place + " is \"" + wanted + "\"; this build has " + known);
}

const DeviceFlow* device_flow(std::string_view function, const Tensor& q, const Execution& execution) {
  return named_backend(execution.backend, q.device, function).device;
}

DeviceBatch batch_of(const Sequences& sequences) {
  DeviceBatch batch{.q_starts = sequences.q.data(),
                    .k_starts = sequences.k.data(),
                    .count = static_cast<std::int64_t>(sequences.k.size()) - 1};
  for (std::size_t s = 0; s + 1 < sequences.k.size(); ++s)
    batch.longest = std::max(batch.longest, std::int64_t{sequences.k[s + 1]} - sequences.k[s]);
  return batch;
}

const Backend& choose_backend(const std::string& name, const Problem& problem, std::string_view function) {
  const Backend& backend = named_backend(name, problem.q.device, function);
  const std::string why = backend.device != nullptr ? "works on CUDA tensors" : backend.refuses(problem);
  if (!why.empty()) throw Error(std::string(function) + ": backend " + std::string(backend.name) + " " + why);
  return backend;
}

}  // namespace moba
