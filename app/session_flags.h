#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/routing_flags.h"
#include "llm/session/session.h"
#include "moba/tensor.h"

// The flags of every subcommand that runs a model: which one, how it attends, on how many threads.
namespace moba::app {

inline const std::map<std::string, llm::AttentionMode> kAttentionModes{
    {"full", llm::AttentionMode::full},
    {"moba", llm::AttentionMode::moba},
    {"moba-naive", llm::AttentionMode::moba_naive}};

/// Before they are checked; unset where a default applies.
struct SessionFlags {
  std::string model;
  llm::AttentionMode decode = llm::AttentionMode::full;
  RoutingFlags routing;
  std::optional<std::int64_t> full_tail, threads;
  DType dtype = DType::f32;
};

/// Adds -m and -t.
void add_model_flags(CLI::App& command, SessionFlags& flags);
void add_dtype_flag(CLI::App& command, SessionFlags& flags);
/// Adds --moba-chunk-size, --moba-topk, --moba-sink and --moba-full-layers.
void add_block_flags(CLI::App& command, SessionFlags& flags);
/// Adds --decode and --moba-full-tail.
void add_answer_flags(CLI::App& command, SessionFlags& flags);

/// Returns one session's settings for each attention variant of the prefill. The --moba flags are accepted
/// and idle where every variant is full. Throws UsageError, naming the flag, for values out of range.
std::vector<llm::SessionSettings> sessions_from(const SessionFlags& flags,
                                                const std::vector<llm::AttentionMode>& prefills);

/// Adds --decode and what is in force of the --moba flags, under their names.
void add_attention(nlohmann::ordered_json& json, const llm::SessionSettings& session);

}  // namespace moba::app
