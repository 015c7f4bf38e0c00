#include "backend.h"

#include <array>
#include <cstdlib>

#include "errors.h"

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

const Backend& named_backend(const std::string& name, Device device) {
  const char* forced = std::getenv("MOBA_BACKEND");
  const bool from_environment = name.empty() && forced != nullptr && *forced != '\0';
  const std::string wanted = from_environment         ? forced
                             : !name.empty()          ? name
                             : device == Device::cuda ? "cuda"
                                                      : "cpu";
  const char* argument = from_environment ? "MOBA_BACKEND" : "backend";
  std::string known;
  for (const std::string& built : backends()) known.append(known.empty() ? "" : ", ").append(built);
  for (const Backend* backend : kBackends) {
    if (backend->name != wanted) continue;
    if (backend->missing.empty()) return *backend;
    refuse(argument, "expected one of this build (", known, "), got ", wanted, ": ", backend->missing);
  }
  refuse(argument, "expected one of this build (", known, "), got \"", wanted, "\"");
}

DeviceBatch batch_of(const Sequences& sequences) {
  DeviceBatch batch{.q_starts = sequences.cu_seqlens_q.data(),
                    .k_starts = sequences.cu_seqlens_k.data(),
                    .count = static_cast<std::int64_t>(sequences.cu_seqlens_k.size()) - 1};
  for (std::size_t s = 0; s + 1 < sequences.cu_seqlens_k.size(); ++s)
    batch.max_seqlen_k =
        std::max(batch.max_seqlen_k, std::int64_t{sequences.cu_seqlens_k[s + 1]} - sequences.cu_seqlens_k[s]);
  return batch;
}

DeviceBatch batch_of(const DeviceSequences& sequences) {
  return {sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.count, sequences.max_seqlen_k, true};
}

const Backend& host_backend(const std::string& name) {
  const Backend& backend = named_backend(name, Device::cpu);
  if (backend.device != nullptr)
    refuse("backend", "expected one that works on CPU tensors, got ", backend.name);
  return backend;
}

const Backend& choose_backend(const std::string& name, const Call& call) {
  const Backend& backend = named_backend(name, call.q.device);
  const std::string why = backend.device != nullptr ? "works on CUDA tensors" : backend.refuses(call);
  if (!why.empty())
    refuse("backend", "expected one that takes this call, got ", backend.name, ", which ", why);
  return backend;
}

}  // namespace moba
