#include "app/engine_flags.h"

#include <cstdio>

#include "llm/engine/model_fingerprint.h"

namespace moba::app {

llm::EngineSettings engine_settings(const EngineFlags& flags, const llm::Weights& weights,
                                    const std::string& subcommand) {
  const llm::SessionSettings& session = flags.session;
  llm::EngineSettings engine;
  engine.block_size = session.moba.block_size;
  engine.full_layers = session.full_layers;
  engine.kv_dtype = session.kv_dtype;
  engine.context = flags.context;
  engine.chunk = session.chunk;
  engine.threads = session.threads;
  if (flags.cache_dir) {
    engine.cache_folder = *flags.cache_dir;
    engine.model_fingerprint = llm::model_fingerprint(weights, flags.arithmetic);
    engine.warn = [subcommand](const std::string& line) {
      std::fprintf(stderr, "moba %s: %s\n", subcommand.c_str(), line.c_str());
    };
  }
  return engine;
}

}  // namespace moba::app
