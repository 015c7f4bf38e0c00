#include "llm/session/choose_attention.h"

#include <gtest/gtest.h>

namespace moba::llm {
namespace {

using enum AttentionMode;

constexpr Routing kRouting{.block_size = 256, .top_k = 4};

AttentionRequest request(std::int64_t prompt, bool trained) {
  AttentionRequest request;
  request.prompt_tokens = prompt;
  request.moba = kRouting;
  if (trained) {
    request.trained.emplace().block_size = kRouting.block_size;
    request.trained->top_k = kRouting.top_k;
  }
  return request;
}

void expect_choice(const AttentionRequest& request, AttentionMode prefill, AttentionMode decode,
                   AttentionReason reason) {
  const AttentionChoice choice = choose_attention(request);
  EXPECT_EQ(name_of(choice.prefill), name_of(prefill));
  EXPECT_EQ(name_of(choice.decode), name_of(decode));
  EXPECT_EQ(name_of(choice.reason), name_of(reason));
}

TEST(ChooseAttention, BreakEvenIsNotBelowTheSelectedTokens) {
  EXPECT_GE(break_even_length(kRouting), 256 * 4);
  EXPECT_GT(break_even_length({.block_size = 256, .top_k = 16}), break_even_length(kRouting));
  EXPECT_GT(break_even_length(Routing::full()), std::int64_t{1} << 40);
}

TEST(ChooseAttention, TrainedModelReadsLongPromptsWithMobaAndDecodesFully) {
  const std::int64_t even = break_even_length(kRouting);
  expect_choice(request(even, true), full, full, AttentionReason::short_prompt);
  expect_choice(request(even + 1, true), moba, full, AttentionReason::trained);
}

TEST(ChooseAttention, OtherModelsUseFullAttention) {
  expect_choice(request(100, false), full, full, AttentionReason::short_prompt);
  expect_choice(request(1 << 20, false), full, full, AttentionReason::not_trained);
}

TEST(ChooseAttention, CalibratedModelReadsLongPromptsWithMoba) {
  AttentionRequest calibrated = request(1 << 20, false);
  calibrated.calibrated = {Routing::full(), kRouting, {.block_size = 64, .top_k = 4}};
  EXPECT_EQ(break_even_length(calibrated.calibrated), break_even_length(kRouting));
  expect_choice(calibrated, moba, full, AttentionReason::calibrated);
  calibrated.prompt_tokens = break_even_length(kRouting);
  expect_choice(calibrated, full, full, AttentionReason::short_prompt);
  calibrated.calibrated = {Routing::full()};
  calibrated.prompt_tokens = 1 << 20;
  expect_choice(calibrated, full, full, AttentionReason::short_prompt);
}

TEST(ChooseAttention, RequestedModesStay) {
  AttentionRequest both = request(100, false);
  both.prefill = moba_naive;
  both.decode = moba;
  expect_choice(both, moba_naive, moba, AttentionReason::requested);

  AttentionRequest decode = request(1 << 20, true);
  decode.decode = moba;
  expect_choice(decode, moba, moba, AttentionReason::trained);
}

TEST(ChooseAttention, RequestedPrefillLeavesDecodeFull) {
  for (const AttentionMode mode : {full, moba}) {
    AttentionRequest prefill = request(1 << 20, true);
    prefill.prefill = mode;
    expect_choice(prefill, mode, full, AttentionReason::requested);
  }
}

}  // namespace
}  // namespace moba::llm
