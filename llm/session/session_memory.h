#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"
#include "llm/session/session.h"

namespace moba::llm {

/// Returns the bytes that this process may still use: what the machine has available and the limits of its
/// control groups, without their page cache. `root` is that of the file system.
std::int64_t available_memory(const std::filesystem::path& root = "/");

/// The memory of a session in bytes.
struct SessionMemory {
  /// The weights, the activations of one chunk, and what the program and the attention need beside them.
  std::int64_t fixed = 0;
  /// The KV cache of one token.
  std::int64_t token = 0;
};
SessionMemory session_memory(const Weights& weights, const Arithmetic& arithmetic,
                             const SessionSettings& settings);

/// Throws DataError, which begins with `model`, if `memory` with `tokens` tokens in the cache exceeds
/// `available` bytes.
void check_memory(const std::string& model, const SessionMemory& memory, std::int64_t tokens,
                  std::int64_t available);

}  // namespace moba::llm
