#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "app/session_flags.h"
#include "llm/engine/engine.h"

// What the subcommands that run the engine share.
namespace moba::app {

struct EngineFlags : SessionFlags {
  /// Maximum tokens of prompt and answer together; 0: as many as the model was trained for.
  std::int64_t context = 0;
  std::optional<std::string> cache_dir;
  std::int64_t cache_dir_bytes = std::int64_t{32} << 30;
  /// Attention; unset: auto.
  std::optional<llm::AttentionMode> prefill, decode;
};

/// Uses the calibration beside the model, if there is one, where the attention and its routing are left to
/// the program.
void find_calibration(const FlagTable& flags, EngineFlags& settings);
/// Adds --cache-dir, and --cache-dir-size. `is_json`: the subcommand reports them.
void add_cache_dir_flags(FlagTable& flags, EngineFlags& settings, const char* help, bool is_json);

/// Returns the engine's settings by these flags; warnings name the subcommand.
llm::EngineSettings engine_settings(const EngineFlags& flags, const llm::Weights& weights,
                                    const std::string& subcommand);

}  // namespace moba::app
