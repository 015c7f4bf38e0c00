#include "build_files.h"
#include "llm/formats/read_config.h"
#include "llm/formats/write_config.h"

namespace moba::llm {
namespace {

/// Returns the config.json of a small model, with the members of `changes` (null: left out).
nlohmann::json config_json(const std::string& type,
                           const nlohmann::json& changes = nlohmann::json::object()) {
  nlohmann::json config{
      {"model_type", type},       {"num_hidden_layers", 2},         {"hidden_size", 64},
      {"intermediate_size", 128}, {"num_attention_heads", 4},       {"num_key_value_heads", 2},
      {"vocab_size", 100},        {"max_position_embeddings", 512}, {"sliding_window", nullptr}};
  config.update(changes);
  return config;
}

ModelConfig parsed(const nlohmann::json& config) {
  return read_config(JsonValue(config, "config.json"));
}

std::string complaint(const std::string& type, const nlohmann::json& changes) {
  return complaint_of([&] { parsed(config_json(type, changes)); });
}

TEST(Config, HasTheDefaultsOfTransformers) {
  const ModelConfig llama = parsed(config_json("llama", {{"num_key_value_heads", nullptr}}));
  EXPECT_EQ(llama.kv_heads, 4);
  EXPECT_EQ(llama.head_dim, 16);
  EXPECT_EQ(llama.norm_eps, 1e-6);
  EXPECT_EQ(llama.rope_theta, 10000);
  EXPECT_EQ(llama.rope.kind, RopeScaling::Kind::none);
  EXPECT_FALSE(llama.qkv_bias || llama.output_bias || llama.mlp_bias || llama.qk_norm ||
               llama.tied_embeddings);
  const ModelConfig qwen2 = parsed(config_json("qwen2"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.output_bias);
  const ModelConfig qwen3 = parsed(config_json("qwen3", {{"attention_bias", true}}));
  EXPECT_TRUE(qwen3.qk_norm && qwen3.qkv_bias && qwen3.output_bias);
  EXPECT_EQ(qwen3.head_dim, 128);
}

TEST(Config, RoundTripsMobaSettings) {
  EXPECT_FALSE(parsed(config_json("llama")).moba);
  const nlohmann::json given{{"moba_chunk_size", 128}, {"moba_topk", 16}, {"moba_full_layers", {0, 1}}};
  const ModelConfig config = parsed(config_json("llama", given));
  ASSERT_TRUE(config.moba);
  const ModelConfig again = parsed(llm::config_json(config));
  ASSERT_TRUE(again.moba);
  EXPECT_EQ(again.moba->block_size, 128);
  EXPECT_EQ(again.moba->top_k, 16);
  EXPECT_EQ(again.moba->sink_blocks, 0);
  EXPECT_EQ(again.moba->full_tail, 0);
  EXPECT_EQ(again.moba->full_layers.size(), 2U);
  EXPECT_TRUE(again.moba->layers.empty());
}

TEST(Config, RoundTripsMobaListsOfLayers) {
  const nlohmann::json given{{"moba_chunk_size", {128, 64}}, {"moba_topk", 16}, {"moba_sink", {0, 3}}};
  const ModelConfig again = parsed(llm::config_json(parsed(config_json("llama", given))));
  ASSERT_TRUE(again.moba);
  EXPECT_EQ(again.moba->block_size, 128);
  ASSERT_EQ(again.moba->layers.size(), 2U);
  EXPECT_EQ(again.moba->layers[0].block_size, 128);
  EXPECT_EQ(again.moba->layers[0].sink_blocks, 0);
  EXPECT_EQ(again.moba->layers[1].block_size, 64);
  EXPECT_EQ(again.moba->layers[1].top_k, 16);
  EXPECT_EQ(again.moba->layers[1].sink_blocks, 3);
}

TEST(Config, InvalidMobaSettingsThrow) {
  nlohmann::json given{{"moba_topk", 3}};
  EXPECT_EQ(complaint("llama", given), "config.json: expected a member 'moba_chunk_size', got none");
  given["moba_chunk_size"] = 0;
  EXPECT_EQ(complaint("llama", given), "config.json: moba_chunk_size: expected 1 to 2147483647, got 0");
  given["moba_chunk_size"] = 64;
  given["moba_sink"] = 3;
  EXPECT_EQ(complaint("llama", given), "config.json: moba_sink: expected fewer than moba_topk 3, got 3");
  given["moba_sink"] = {0, 3};
  EXPECT_EQ(complaint("llama", given), "config.json: moba_sink: expected fewer than moba_topk 3, got 3");
  given["moba_sink"] = {0, 0, 0};
  EXPECT_EQ(complaint("llama", given),
            "config.json: moba_sink: expected 2 numbers (one for each layer), got 3");
  given["moba_sink"] = 0;
  given["moba_full_layers"] = {2};
  EXPECT_EQ(complaint("llama", given), "config.json: moba_full_layers[0]: expected 0 to 1, got 2");
}

TEST(Config, ReadsEveryRopeScalingInBothSpellings) {
  const nlohmann::json llama3{{"rope_type", "llama3"},  {"factor", 8.0},
                              {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
                              {"rope_theta", 5e5},      {"original_max_position_embeddings", 64}};
  nlohmann::json yarn{{"type", "yarn"}, {"factor", 4.0},     {"beta_fast", nullptr},
                      {"mscale", 0.7},  {"truncate", false}, {"original_max_position_embeddings", 128}};
  for (const char* spelling : {"rope_scaling", "rope_parameters"}) {
    const ModelConfig three = parsed(config_json("llama", {{spelling, llama3}}));
    EXPECT_EQ(three.rope.kind, RopeScaling::Kind::llama3);
    EXPECT_EQ(three.rope.factor, 8);
    EXPECT_EQ(three.rope.high_freq_factor, 4);
    EXPECT_EQ(three.rope.original_context, 64);
    EXPECT_EQ(three.rope_theta, 5e5);
    const ModelConfig scaled = parsed(config_json("llama", {{spelling, yarn}, {"rope_theta", 2e4}}));
    EXPECT_EQ(scaled.rope.kind, RopeScaling::Kind::yarn);
    EXPECT_EQ(scaled.rope.beta_fast, 32);
    EXPECT_EQ(scaled.rope.mscale, 0.7);
    EXPECT_FALSE(scaled.rope.mscale_all_dim);
    EXPECT_FALSE(scaled.rope.truncate);
    EXPECT_EQ(scaled.rope.original_context, 128);
    EXPECT_EQ(scaled.rope_theta, 2e4);
    const ModelConfig linear =
        parsed(config_json("llama", {{spelling, {{"rope_type", "linear"}, {"factor", 3}}}}));
    EXPECT_EQ(linear.rope.kind, RopeScaling::Kind::linear);
    EXPECT_EQ(linear.rope.factor, 3);
  }
  yarn.erase("factor");
  yarn.erase("original_max_position_embeddings");
  EXPECT_EQ(parsed(config_json("llama", {{"rope_scaling", yarn}})).rope.original_context, 512);
  yarn["original_max_position_embeddings"] = 128;
  EXPECT_EQ(parsed(config_json("llama", {{"rope_scaling", yarn}})).rope.factor, 4);
}

TEST(Config, UnknownRopeScalingThrows) {
  for (const char* kind : {"dynamic", "longrope", "su", "mrope", "proportional"}) {
    EXPECT_EQ(
        complaint("llama", {{"rope_scaling", {{"rope_type", kind}, {"factor", 2}}}}),
        std::string("config.json: rope_scaling: expected a RoPE scaling of type default, linear, llama3 or "
                    "yarn, got '") +
            kind + "'");
  }
  EXPECT_NE(complaint("llama", {{"rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}}}), "");
  EXPECT_NE(complaint("llama", {{"partial_rotary_factor", 0.5}}), "");
  EXPECT_NE(complaint("llama", {{"rope_parameters", {{"rope_theta", 1e4}, {"partial_rotary_factor", 0.5}}}}),
            "");
  EXPECT_NE(complaint("llama", {{"rope_theta", -1}}), "");
  EXPECT_NE(complaint("llama", {{"rope_scaling", {{"type", "linear"}}}}), "");
  EXPECT_NE(complaint("llama", {{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}}), "");
}

TEST(Config, SlidingWindowBelowTheContextThrows) {
  EXPECT_EQ(complaint("mistral", {{"sliding_window", 256}}),
            "config.json: expected full attention (sliding_window null), got a sliding window of 256 tokens");
  EXPECT_EQ(complaint("mistral", {{"sliding_window", 512}}), "");
  nlohmann::json silent = config_json("mistral", {{"max_position_embeddings", 8192}});
  silent.erase("sliding_window");
  EXPECT_NE(complaint_of([&] { parsed(silent); }), "");
  EXPECT_EQ(complaint("llama", {{"sliding_window", 256}}), "");
  for (const char* type : {"qwen2", "qwen3"}) {
    EXPECT_EQ(complaint(type, {{"sliding_window", 256}}), "");
    EXPECT_EQ(complaint(type, {{"sliding_window", 256}, {"use_sliding_window", false}}), "");
    EXPECT_EQ(complaint(type, {{"sliding_window", 256}, {"use_sliding_window", true}}),
              "");  // from layer 28 on
    EXPECT_NE(
        complaint(type, {{"sliding_window", 256}, {"use_sliding_window", true}, {"max_window_layers", 1}}),
        "");
    const nlohmann::json mixed{"full_attention", "sliding_attention"},
        full{"full_attention", "full_attention"};
    EXPECT_NE(complaint(type, {{"sliding_window", 256}, {"layer_types", mixed}}), "");
    EXPECT_EQ(complaint(type, {{"sliding_window", 256}, {"layer_types", full}}), "");
    EXPECT_NE(complaint(type, {{"layer_types", {"linear_attention"}}}), "");
  }
}

TEST(Config, UnsupportedModelsThrow) {
  EXPECT_EQ(complaint("gemma3", nlohmann::json::object()),
            "config.json: model_type: expected llama, mistral, qwen2 or qwen3, got 'gemma3'");
  EXPECT_NE(complaint("llama", {{"hidden_act", "gelu"}}), "");
  EXPECT_EQ(
      complaint("llama", {{"quantization_config", {{"quant_method", "gptq"}}}}),
      "config.json: quantization_config: expected weights in f32, f16 or bf16, got quantised ones: 'gptq'");
  for (const nlohmann::json& bad : {nlohmann::json(0), nlohmann::json(-1), nlohmann::json(1LL << 40),
                                    nlohmann::json(1.5), nlohmann::json("2"), nlohmann::json()}) {
    EXPECT_NE(complaint("llama", {{"num_hidden_layers", bad}}), "") << bad;
  }
  EXPECT_NE(complaint("llama", {{"num_attention_heads", 5}}), "");
}

/// Returns GGUF metadata of the same small model.
GgufText config_gguf(const std::string& architecture) {
  GgufText text;
  text.text("general.architecture", architecture);
  const auto key = [&](const char* name) { return architecture + "." + name; };
  text.u32(key("block_count"), 2).u32(key("embedding_length"), 64).u32(key("feed_forward_length"), 128);
  text.u32(key("attention.head_count"), 4).u32(key("context_length"), 512);
  return text.tensor("token_embd.weight", {100, 64});
}

class GgufConfig : public WithFolder {
 protected:
  ModelConfig parsed_gguf(const GgufText& text) const {
    return read_config(GgufFile::open(write("m", text.str())));
  }
  std::string complaint_gguf(const GgufText& text) const {
    return complaint_of([&] { parsed_gguf(text); });
  }
};

TEST_F(GgufConfig, ReadsShapes) {
  const ModelConfig llama = parsed_gguf(config_gguf("llama"));
  EXPECT_EQ(llama.kv_heads, 4);
  EXPECT_EQ(llama.head_dim, 16);
  EXPECT_EQ(llama.vocab, 100);
  EXPECT_TRUE(llama.tied_embeddings);
  EXPECT_FALSE(parsed_gguf(config_gguf("llama").tensor("output.weight", {100, 64})).tied_embeddings);
  EXPECT_TRUE(parsed_gguf(config_gguf("llama").tensor("blk.0.attn_q.bias", {64})).qkv_bias);
  EXPECT_TRUE(parsed_gguf(config_gguf("qwen2")).qkv_bias);
  EXPECT_TRUE(parsed_gguf(config_gguf("qwen3")).qk_norm);
  EXPECT_EQ(parsed_gguf(config_gguf("qwen3").u32("qwen3.attention.key_length", 32)).head_dim, 32);
  const std::string two_layers = bytes_of(2) + bytes_of(2);
  EXPECT_EQ(
      parsed_gguf(config_gguf("llama").array("llama.attention.head_count_kv", GgufType::i32, 2, two_layers))
          .kv_heads,
      2);
}

TEST_F(GgufConfig, ReadsRopeScaling) {
  const ModelConfig yarn = parsed_gguf(config_gguf("qwen2")
                                           .f32("qwen2.rope.freq_base", 1e6F)
                                           .text("qwen2.rope.scaling.type", "yarn")
                                           .f32("qwen2.rope.scaling.factor", 4)
                                           .f32("qwen2.rope.scaling.attn_factor", 2)
                                           .u32("qwen2.rope.scaling.original_context_length", 128));
  EXPECT_EQ(yarn.rope.kind, RopeScaling::Kind::yarn);
  EXPECT_EQ(yarn.rope_theta, 1e6);
  EXPECT_EQ(yarn.rope.factor, 4);
  EXPECT_EQ(yarn.rope.original_context, 128);
  EXPECT_NEAR(yarn.rope.attention_factor.value(), 2 * (1 + 0.1 * 1.3862943611), 1e-9);
  const ModelConfig linear = parsed_gguf(config_gguf("llama").f32("llama.rope.scale_linear", 2));
  EXPECT_EQ(linear.rope.kind, RopeScaling::Kind::linear);
  EXPECT_EQ(linear.rope.factor, 2);
  EXPECT_NE(complaint_gguf(config_gguf("llama").text("llama.rope.scaling.type", "longrope")), "");
  EXPECT_NE(complaint_gguf(config_gguf("llama").tensor("rope_freqs.weight", {8})), "");  // zeros
  EXPECT_NE(complaint_gguf(config_gguf("llama").tensor("rope_freqs.weight", {4})), "");
}

TEST_F(GgufConfig, ReadsMobaSettings) {
  EXPECT_FALSE(parsed_gguf(config_gguf("llama")).moba);
  const auto trained =
      parsed_gguf(config_gguf("llama").u32("moba.chunk_size", 128).u32("moba.topk", 16)).moba;
  ASSERT_TRUE(trained);
  EXPECT_EQ(trained->block_size, 128);
  EXPECT_EQ(trained->top_k, 16);
  EXPECT_EQ(trained->sink_blocks, 0);
  EXPECT_EQ(trained->full_tail, 0);
  EXPECT_TRUE(trained->full_layers.empty());
  const auto all = parsed_gguf(config_gguf("qwen3")
                                   .u32("moba.chunk_size", 64)
                                   .u32("moba.topk", 3)
                                   .u32("moba.sink", 1)
                                   .u32("moba.full_tail", 32)
                                   .array("moba.full_layers", GgufType::u32, 1, bytes_of(1)))
                       .moba;
  ASSERT_TRUE(all);
  EXPECT_EQ(all->sink_blocks, 1);
  EXPECT_EQ(all->full_tail, 32);
  EXPECT_EQ(layers_in(all->full_layers), std::vector<std::int64_t>{1});
}

TEST_F(GgufConfig, InvalidMobaSettingsThrow) {
  const auto expect = [&](const GgufText& text, const std::string& error) {
    EXPECT_EQ(complaint_gguf(text), (folder_ / "m").string() + ": " + error);
  };
  GgufText text = config_gguf("llama");
  expect(text.u32("moba.topk", 3), "expected metadata 'moba.chunk_size', got none");
  text = config_gguf("llama").u32("moba.topk", 3);
  expect(GgufText(text).u32("moba.chunk_size", 0),
         "metadata 'moba.chunk_size': expected 1 to 2147483647, got 0");
  text.u32("moba.chunk_size", 64);
  expect(GgufText(text).u32("moba.sink", 3), "metadata 'moba.sink': expected fewer than moba.topk 3, got 3");
  expect(GgufText(text).array("moba.full_layers", GgufType::i32, 1, bytes_of(2)),
         "metadata 'moba.full_layers': expected 0 to 1, got 2");
  expect(GgufText(text).text("moba.full_layers", "0"),
         "metadata 'moba.full_layers': expected an array of integers, got string");
}

TEST_F(GgufConfig, UnsupportedModelsThrow) {
  EXPECT_NE(complaint_gguf(config_gguf("gemma3")), "");
  EXPECT_NE(complaint_gguf(config_gguf("llama").u32("llama.expert_count", 8)), "");
  EXPECT_NE(complaint_gguf(config_gguf("llama").u32("llama.rope.dimension_count", 8)), "");
  EXPECT_NE(complaint_gguf(config_gguf("llama").u32("llama.attention.value_length", 8)), "");
  EXPECT_NE(complaint_gguf(config_gguf("llama").u32("llama.attention.sliding_window", 256)), "");
  EXPECT_EQ(complaint_gguf(config_gguf("llama").u32("llama.attention.sliding_window", 512)), "");
  const std::string differing = bytes_of(2) + bytes_of(4);
  EXPECT_NE(complaint_gguf(
                config_gguf("llama").array("llama.attention.head_count_kv", GgufType::i32, 2, differing)),
            "");
}

}  // namespace
}  // namespace moba::llm
