#include "llm/session/choose_attention.h"

#include <algorithm>
#include <limits>

namespace moba::llm {
namespace {

AttentionReason reason_for(const AttentionRequest& request) {
  if (request.prefill) return AttentionReason::requested;
  const bool is_calibrated = !request.calibrated.empty();
  const std::int64_t break_even =
      is_calibrated ? break_even_length(request.calibrated) : break_even_length(request.moba);
  if (request.prompt_tokens <= break_even) return AttentionReason::short_prompt;
  return request.trained ? AttentionReason::trained
         : is_calibrated ? AttentionReason::calibrated
                         : AttentionReason::not_trained;
}

}  // namespace

std::string_view name_of(AttentionReason reason) {
  switch (reason) {
    case AttentionReason::requested:
      return "requested";
    case AttentionReason::short_prompt:
      return "short prompt";
    case AttentionReason::calibrated:
      return "calibrated for MoBA";
    case AttentionReason::trained:
      return "trained with MoBA";
    case AttentionReason::not_trained:
      return "not trained with MoBA";
  }
  return "?";
}

std::int64_t break_even_length(const Routing& moba) {
  // Up to block_size * top_k tokens every query reads all of its keys. Twice that is where the gate has
  // earned its cost, in bf16 with AMX: measured 1.4 times with 3 blocks of 512, 1.8 with 4 of 256, 3 with 16
  // of 128.
  constexpr std::int64_t kFactor = 2, kMax = std::numeric_limits<std::int64_t>::max();
  return kFactor * moba.block_size * std::min(moba.top_k, kMax / (kFactor * moba.block_size));
}

std::int64_t break_even_length(const std::vector<Routing>& layers) {
  std::int64_t longest = 0;
  for (const Routing& routing : layers) {
    if (!is_full(routing)) longest = std::max(longest, break_even_length(routing));
  }
  return longest > 0 ? longest : Routing::kEverything;
}

AttentionChoice choose_attention(const AttentionRequest& request) {
  const AttentionReason reason = reason_for(request);
  const bool is_sparse = reason == AttentionReason::trained || reason == AttentionReason::calibrated;
  return {.prefill = request.prefill.value_or(is_sparse ? AttentionMode::moba : AttentionMode::full),
          .decode = request.decode.value_or(AttentionMode::full),
          .reason = reason};
}

}  // namespace moba::llm
