#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <ctime>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "app/commands.h"
#include "app/program.h"
#include "app/serve/engine_thread.h"
#include "app/serve/http_server.h"
#include "app/serve/serve_settings.h"
#include "app/serve/service.h"
#include "llm/engine/engine.h"
#include "llm/error.h"
#include "llm/formats/weights.h"
#include "llm/session/session_memory.h"

namespace moba::app {
namespace {

namespace fs = std::filesystem;

/// "SmolLM2.gguf" is SmolLM2, the folder models/needle-2m needle-2m.
std::string name_of_model(const std::string& path) {
  const fs::path full = fs::weakly_canonical(path);
  return fs::is_directory(full) ? full.filename().string() : full.stem().string();
}

llm::EngineSettings settings_of_engine(const ServeSettings& settings, const llm::Weights& weights) {
  llm::EngineSettings engine = engine_settings(settings, weights, "serve");
  if (settings.max_step > 0) engine.max_step_seconds = 1e-3 * static_cast<double>(settings.max_step);
  engine.max_running = settings.parallel;
  engine.max_waiting = settings.parallel + settings.queue;  // EngineThread limits both together
  engine.cache_bytes = static_cast<std::size_t>(settings.cache_bytes);
  return engine;
}

void check_memory(const ServeSettings& settings, const llm::Weights& weights) {
  const llm::SessionMemory memory = llm::session_memory(weights, settings.arithmetic, settings.session);
  const std::int64_t available = llm::available_memory();
  llm::check_memory(settings.model, memory, 0, available);
  if (memory.fixed + settings.cache_bytes > available) {
    throw llm::DataError(fmt::format("--cache-size: expected at most {} bytes beside the model, got {}",
                                     available - memory.fixed, settings.cache_bytes));
  }
}

int serve(const FlagTable& flags, ServeSettings& settings) {
  complete(settings);
  AccessSettings access;
  if (settings.api_key_file) access.keys = ApiKeys::read(*settings.api_key_file);
  access.cors_origin = settings.http.cors_origin;
  const llm::Weights weights = llm::Weights::open(settings.model);
  find_calibration(flags, settings);
  complete(flags, weights, settings);
  if (settings.context == 0) settings.context = weights.config().context;
  check(settings.session, weights.config());
  check_memory(settings, weights);
  const std::int64_t capacity = settings.parallel + settings.queue;

  llm::use_threads(settings.session.threads);
  llm::Engine engine(llm::Model::load(weights, settings.arithmetic), settings_of_engine(settings, weights));
  const ServedModel model{.name = settings.alias.value_or(name_of_model(settings.model)),
                          .config = weights.config(),
                          .tokenizer = llm::Tokenizer::open(settings.model),
                          .prefill = settings.prefill,
                          .decode = settings.decode,
                          .moba = settings.session.moba,
                          .layers = settings.session.layers,
                          .full_tail = settings.session.full_tail,
                          .context = engine.max_prompt(),
                          .max_answers = capacity,
                          .created = std::time(nullptr)};
  EngineThread thread(std::move(engine), capacity, settings.session.threads);
  Service service(model, thread, access);
  HttpServer server(settings.http, {
                                       .check = [&](const auto& head) { return service.check(head); },
                                       .handle = [&](const auto& request) { return service.handle(request); },
                                       .count = [&](unsigned status) { service.count(status); },
                                       .begin_stop = [&] { service.begin_stop(); },
                                       .abort = [&] { thread.stop(); },
                                   });
  const bool is_ipv6 = settings.http.host.find(':') != std::string::npos;
  const std::string host = is_ipv6 ? "[" + settings.http.host + "]" : settings.http.host;
  print(fmt::format("{} at http://{}:{}/v1\n", model.name, host, server.port()));
  server.run();
  return 0;
}

}  // namespace

CLI::App* add_serve(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command =
      parent.add_subcommand("serve", "Answer requests of OpenAI's API, many at a time, by HTTP");
  const auto flags = std::make_shared<FlagTable>(*command);
  const auto settings = std::make_shared<ServeSettings>();
  add_flags(*flags, *settings);
  command->footer(
      "Example: serve a model on this machine, and ask it\n"
      "  moba serve -m SmolLM2-135M-Instruct.Q4_1.gguf --port 8080\n"
      "  curl http://127.0.0.1:8080/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", "
      "\"content\": "
      "\"Hi\"}]}'\n");
  command->callback([=, &action] { action = [=] { return serve(*flags, *settings); }; });
  return command;
}

}  // namespace moba::app
