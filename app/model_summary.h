#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "llm/formats/tensor.h"
#include "llm/formats/weights.h"

// Size of a model's weights, as `moba info` and `moba bench` show it.
namespace moba::app {

/// The tensors of one storage type.
struct StorageShare {
  std::int64_t tensors = 0;
  std::uint64_t bytes = 0;
};

/// Returns tensors and bytes of each storage type, in the order of the enumeration.
std::map<llm::Storage, StorageShare> storage_mix(const llm::Weights& weights);
std::int64_t parameter_count(const llm::Weights& weights);

/// Returns 134515008 as "134.5 M".
std::string count_text(std::int64_t count);
/// Returns 1048576 as "1.0 MiB".
std::string bytes_text(std::uint64_t bytes);

}  // namespace moba::app
