#pragma once

#include <string>

#include "app/flags.h"
#include "llm/train/run.h"

namespace moba::app {

/// The variables of the flags of `moba train`, and after complete() the settings of a run.
struct TrainSettings : llm::train::RunSettings {
  /// Text of --attn-schedule.
  std::string attention = "moba:1";
  llm::train::LoraSettings lora;
};

void add_flags(FlagTable& flags, TrainSettings& settings);

/// Fills in the defaults that are no constants and checks the flags against each other. Throws UsageError.
void complete(const FlagTable& flags, TrainSettings& settings);

}  // namespace moba::app
