#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "llm/config.h"
#include "llm/session/session.h"
#include "moba/attention.h"

namespace moba::llm {

/// The inputs of choose_attention.
struct AttentionRequest {
  std::optional<AttentionMode> prefill, decode;  // unset: to be chosen
  std::int64_t prompt_tokens = 0;
  /// Maximum tokens of prompt and answer together.
  std::int64_t total_tokens = 0;
  Routing moba;
  /// Unset for a model that was not trained with MoBA.
  std::optional<TrainedAttention> trained;
};

/// The reason for the attention in prefill.
enum class AttentionReason : std::uint8_t { requested, short_prompt, trained, not_trained };
std::string_view name_of(AttentionReason reason);

struct AttentionChoice {
  AttentionMode prefill, decode;
  AttentionReason reason;
};

/// Returns the length in tokens up to which MoBA is no faster than full attention.
std::int64_t break_even_length(const Routing& moba);

/// Chooses MoBA beyond the break-even length for a model that was trained with it, and full attention
/// otherwise. Decode also uses full attention where prefill is requested to, where the training read the tail
/// of its sequences with full attention, and where it selected more blocks than `moba`.
AttentionChoice choose_attention(const AttentionRequest& request);

}  // namespace moba::llm
