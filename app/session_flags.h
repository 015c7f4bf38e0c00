#pragma once

#include <optional>
#include <string>

#include "app/flags.h"
#include "llm/formats/weights.h"
#include "llm/model/arithmetic.h"
#include "llm/session/session.h"
#include "moba/tensor.h"

// The flags of every subcommand that runs a model.
namespace moba::app {

extern const Words<llm::AttentionMode> kAttentionModes, kDecodeModes;

/// The variables of these flags.
struct SessionFlags {
  std::string model;
  std::optional<DType> dtype, kv_dtype;  // unset: auto
  std::optional<std::string> calibration;
  llm::Arithmetic arithmetic;  // set by complete()
  llm::SessionSettings session;
};

/// Adds -m, --model.
void add_model_flag(FlagTable& flags, SessionFlags& settings);
void add_dtype_flag(FlagTable& flags, SessionFlags& settings);
void add_kv_dtype_flag(FlagTable& flags, SessionFlags& settings);
/// Adds --calibration.
void add_calibration_flag(FlagTable& flags, SessionFlags& settings);
/// Adds --calibration and the --moba flags; --moba-full-tail only if `has_tail`.
void add_moba_flags(FlagTable& flags, SessionFlags& settings, bool has_tail);

/// Applies the defaults of the model and of the machine, and checks the flags against each other. The --moba
/// flags are accepted and idle where attention is full. Throws UsageError, and DataError for the calibration.
void complete(const FlagTable& flags, const llm::Weights& weights, SessionFlags& settings);

}  // namespace moba::app
