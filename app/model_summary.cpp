#include "app/model_summary.h"

#include <fmt/format.h>

namespace moba::app {

std::map<llm::Storage, StorageShare> storage_mix(const llm::Weights& weights) {
  std::map<llm::Storage, StorageShare> mix;
  for (const llm::StoredTensor& tensor : weights.tensors()) {
    StorageShare& share = mix[tensor.storage];
    ++share.tensors;
    share.bytes += tensor.bytes.size();
  }
  return mix;
}

std::int64_t parameter_count(const llm::Weights& weights) {
  std::int64_t parameters = 0;
  for (const llm::StoredTensor& tensor : weights.tensors()) parameters += tensor.count();
  return parameters;
}

std::string count_text(std::int64_t count) {
  const auto value = static_cast<double>(count);
  if (value >= 1e9) return fmt::format("{:.2f} B", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.1f} M", value / 1e6);
  return fmt::format("{:.1f} K", value / 1e3);
}

std::string bytes_text(std::uint64_t bytes) {
  const auto value = static_cast<double>(bytes);
  constexpr double kMiB = 1 << 20, kGiB = 1 << 30;
  if (value >= kGiB) return fmt::format("{:.2f} GiB", value / kGiB);
  if (value >= kMiB) return fmt::format("{:.1f} MiB", value / kMiB);
  return fmt::format("{:.1f} KiB", value / 1024);
}

}  // namespace moba::app
