#include "app/engine_flags.h"

#include <cstdio>
#include <filesystem>

#include "llm/calibrate/calibration.h"
#include "llm/engine/model_fingerprint.h"

namespace moba::app {

void find_calibration(const FlagTable& flags, EngineFlags& settings) {
  if (settings.prefill || settings.calibration) return;
  for (const char* flag : {"--moba-chunk-size", "--moba-topk", "--moba-sink", "--moba-full-layers"})
    if (flags.given(flag)) return;
  const std::filesystem::path file = llm::calibration_beside(settings.model);
  if (std::filesystem::exists(file)) settings.calibration = file.string();
}

void add_cache_dir_flags(FlagTable& flags, EngineFlags& settings, const char* help, bool is_json) {
  constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
  Flag& folder = flags.value("--cache-dir", settings.cache_dir, "PATH", help).default_text("none");
  Flag& size = flags.size("--cache-dir-size", settings.cache_dir_bytes, {1, kMaxBytes},
                          "Maximum bytes of the files in --cache-dir; the least recently used go first");
  if (!is_json) return;
  folder.json();
  size.json();
}

llm::EngineSettings engine_settings(const EngineFlags& flags, const llm::Weights& weights,
                                    const std::string& subcommand) {
  const llm::SessionSettings& session = flags.session;
  llm::EngineSettings engine;
  engine.block_sizes = {session.moba.block_size};
  if (!session.layers.empty()) engine.block_sizes.clear();
  for (const Routing& routing : session.layers) engine.block_sizes.push_back(routing.block_size);
  engine.full_layers = session.full_layers;
  engine.kv_dtype = session.kv_dtype;
  engine.context = flags.context;
  engine.chunk = session.chunk;
  engine.threads = session.threads;
  if (flags.cache_dir) {
    engine.cache_folder = *flags.cache_dir;
    engine.cache_folder_bytes = static_cast<std::uint64_t>(flags.cache_dir_bytes);
    engine.model_fingerprint = llm::model_fingerprint(weights, flags.arithmetic);
    engine.warn = [subcommand](const std::string& line) {
      std::fprintf(stderr, "moba %s: %s\n", subcommand.c_str(), line.c_str());
    };
  }
  return engine;
}

}  // namespace moba::app
