#pragma once

#include <string>

#include "app/flags.h"
#include "llm/session/session.h"
#include "moba/tensor.h"

// The flags of every subcommand that runs a model.
namespace moba::app {

extern const Words<llm::AttentionMode> kAttentionModes;

/// The variables of these flags.
struct SessionFlags {
  std::string model;
  DType dtype = DType::f32;
  llm::SessionSettings session;
};

/// Adds -m, --model.
void add_model_flag(FlagTable& flags, SessionFlags& settings);
void add_dtype_flag(FlagTable& flags, SessionFlags& settings);
/// Adds the --moba flags and, for a subcommand that decodes, --decode and --moba-full-tail.
void add_attention_flags(FlagTable& flags, SessionFlags& settings, bool decodes);

/// Applies the defaults that config.json of the model has, and checks the flags against each other. The
/// --moba flags are accepted and idle where attention is full. Throws UsageError.
void complete(const FlagTable& flags, SessionFlags& settings);

}  // namespace moba::app
