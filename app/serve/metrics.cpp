#include "app/serve/metrics.h"

#include <fmt/format.h>

#include "llm/memory.h"

namespace moba::app {

std::string metrics_text(const llm::EngineStatistics& engine,
                         const std::map<unsigned, std::int64_t>& responses) {
  std::string text;
  const auto head = [&](const char* name, const char* type, const char* help) {
    text += fmt::format("# HELP moba_{0} {1}\n# TYPE moba_{0} {2}\n", name, help, type);
  };
  const auto add = [&](const char* name, const char* type, const char* help, std::int64_t value) {
    head(name, type, help);
    text += fmt::format("moba_{} {}\n", name, value);
  };
  add("num_requests_running", "gauge", "Requests that are read or decoded.", engine.running);
  add("num_requests_waiting", "gauge", "Requests in the queue.", engine.waiting);
  add("kv_cache_pages_used", "gauge", "Pages of the KV cache with a request or a cached prefix.",
      engine.used_pages);
  add("kv_cache_pages_cached", "gauge", "Pages of the prefix cache.", engine.cached_pages);
  add("kv_cache_pages_max", "gauge", "Pages that --cache-size allows.", engine.max_pages);
  add("kv_cache_page_tokens", "gauge", "Tokens of a page.", engine.page_tokens);
  add("prompt_tokens_total", "counter", "Prompt tokens that were computed.", engine.prompt_tokens);
  add("cached_tokens_total", "counter", "Prompt tokens from the prefix cache.", engine.cached_tokens);
  add("generation_tokens_total", "counter", "Tokens of answers.", engine.generated_tokens);
  add("requests_finished_total", "counter", "Requests that have ended, cancelled ones included.",
      engine.finished_requests);
  add("engine_steps_total", "counter", "Steps of the engine.", engine.steps);
  add("evicted_pages_total", "counter", "Pages evicted from the prefix cache.", engine.evicted_pages);
  add("preemptions_total", "counter", "Requests whose pages were taken for an older one.",
      engine.preemptions);
  add("stored_pages", "gauge", "Pages in the folder --cache-dir.", engine.stored_pages);
  add("restored_pages_total", "counter", "Pages that were read from it.", engine.restored_pages);
  head("http_responses_total", "counter", "Responses by status.");
  for (const auto& [status, count] : responses)
    text += fmt::format("moba_http_responses_total{{code=\"{}\"}} {}\n", status, count);
  add("peak_rss_bytes", "gauge", "Maximum resident memory of the process.",
      static_cast<std::int64_t>(llm::peak_rss_bytes()));
  return text;
}

}  // namespace moba::app
