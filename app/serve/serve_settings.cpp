#include "app/serve/serve_settings.h"

#include <fmt/format.h>

#include "llm/error.h"

namespace moba::app {

void add_flags(FlagTable& flags, ServeSettings& settings) {
  constexpr std::int64_t kMaxBytes = std::int64_t{1} << 50;
  add_model_flag(flags, settings);
  flags.value("-a,--alias", settings.alias, "NAME", "Name of the model in requests")
      .default_text("the name of its file");
  flags
      .number("-c,--ctx-size", settings.context, {1, kMaxTokens},
              "Maximum tokens of prompt and answer together; longer requests are refused")
      .default_text("the model's context");
  add_threads_flag(flags, settings.session.threads);
  add_dtype_flag(flags, settings);
  add_kv_dtype_flag(flags, settings);

  flags.group("Requests");
  flags.number("--parallel", settings.parallel, {1, 1024}, "Maximum answers that are computed at a time");
  flags.number("--queue", settings.queue, {0, 65536},
               "Maximum answers that wait besides; further requests get status 429");
  flags.size("--cache-size", settings.cache_bytes, {1, kMaxBytes},
             "Maximum bytes of the KV cache: of running requests and of prefixes of finished ones");
  add_cache_dir_flags(flags, settings,
                      "Folder that keeps prefixes for the next start; its files may be deleted",
                      /*is_json=*/false);
  flags.number("--max-step-ms", settings.max_step, {0, 1'000'000},
               "Time between two tokens of an answer that the reading of other prompts may take, in "
               "milliseconds; 0: no limit");

  flags.group("HTTP");
  flags.value("--host", settings.http.host, "ADDRESS",
              "Address to listen on; one that other machines reach needs --api-key-file");
  flags.number("--port", settings.port, {0, 65535}, "Port to listen on; 0: a free one");
  flags
      .value("--api-key-file", settings.api_key_file, "PATH",
             "File with one API key a line, one of which requests have to bring")
      .default_text("no key");
  flags
      .value("--cors-origin", settings.http.cors_origin, "ORIGIN",
             "Origin of web pages that may use the server, such as http://localhost:3000")
      .default_text("none");
  flags.size("--max-body", settings.max_body, {1, std::int64_t{1} << 30}, "Maximum bytes of a request");
  flags.number("--max-connections", settings.http.max_connections, {1, 65536},
               "Maximum connections; further ones get status 503");
  flags.number("--timeout", settings.http.timeout_seconds, {0.1, 3600},
               "Seconds in which a client has to send a request and to take a part of a response");
  flags.number("--grace", settings.http.grace_seconds, {0, 3600},
               "Seconds that answers may still take after SIGTERM or Ctrl-C");

  flags.group("Attention");
  flags.choice(
      "--attn", settings.prefill, kAttentionModes,
      "Attention for prefill; auto: moba for long prompts if the model was trained with MoBA or has a "
      "calibration beside it (x.moba.json beside x.gguf, model.moba.json in a folder), else full; requests "
      "may choose another");
  flags.choice("--decode", settings.decode, kDecodeModes,
               "Attention for decode; auto: full; requests may choose another");
  add_moba_flags(flags, settings, /*has_tail=*/true);
}

void complete(ServeSettings& settings) {
  settings.http.port = static_cast<std::uint16_t>(settings.port);
  settings.http.max_body = static_cast<std::size_t>(settings.max_body);
  if (!settings.api_key_file && !is_loopback(settings.http.host)) {
    throw llm::UsageError(fmt::format("--host: expected a loopback address without --api-key-file, got {}",
                                      settings.http.host));
  }
}

}  // namespace moba::app
