#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "llm/config.h"
#include "llm/session/session.h"
#include "moba/attention.h"

namespace moba::llm {

/// The inputs of choose_attention.
struct AttentionRequest {
  std::optional<AttentionMode> prefill, decode;  // unset: to be chosen
  std::int64_t prompt_tokens = 0;
  Routing moba;
  /// The routing of each layer, by a calibration or by the training; empty without one.
  std::vector<Routing> calibrated{};
  /// Unset for a model that was not trained with MoBA.
  std::optional<TrainedAttention> trained;
};

/// The reason for the attention in prefill.
enum class AttentionReason : std::uint8_t { requested, short_prompt, calibrated, trained, not_trained };
std::string_view name_of(AttentionReason reason);

struct AttentionChoice {
  AttentionMode prefill, decode;
  AttentionReason reason;
};

/// Returns the length in tokens up to which MoBA is no faster than full attention.
std::int64_t break_even_length(const Routing& moba);
/// The same where each layer has its own routing; kEverything if all of them are full.
std::int64_t break_even_length(const std::vector<Routing>& layers);

/// Chooses MoBA for a prompt beyond the break-even length of a model that was trained with it or calibrated
/// for it, and full attention otherwise. Decode uses full attention, as the paper does: needle-2m, which was
/// trained with MoBA, reads its number with MoBA but loses digits when it decodes with it.
AttentionChoice choose_attention(const AttentionRequest& request);

}  // namespace moba::llm
