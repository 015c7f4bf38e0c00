#include "llm/formats/weights.h"

#include <array>
#include <set>

#include "build_files.h"
#include "llm/formats/tensor_names.h"

namespace moba::llm {
namespace {

/// Returns a model with two heads of four dimensions and one layer.
GgufText model_gguf(const std::string& architecture = "llama", const std::string& left_out = "") {
  GgufText text;
  text.text("general.architecture", architecture);
  const auto key = [&](const char* name) { return architecture + "." + name; };
  text.u32(key("block_count"), 1).u32(key("embedding_length"), 8).u32(key("feed_forward_length"), 16);
  text.u32(key("attention.head_count"), 2).u32(key("context_length"), 64);
  ModelConfig config{.architecture = architecture,
                     .layers = 1,
                     .hidden = 8,
                     .intermediate = 16,
                     .heads = 2,
                     .kv_heads = 2,
                     .head_dim = 4,
                     .vocab = 10,
                     .rope = {},
                     .rope_divisors = {},
                     .moba = {}};
  config.qkv_bias = architecture == "qwen2";
  config.tied_embeddings = true;
  for_each_tensor(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    if (name != left_out) text.tensor(gguf_name(name), shape);
  });
  return text;
}

using WeightsTest = WithFolder;

TEST_F(WeightsTest, FindsTensorsByTheirHuggingFaceNames) {
  const Weights weights = Weights::open(write("m.gguf", model_gguf().str()));
  EXPECT_EQ(weights.find("model.embed_tokens.weight")->name, "token_embd.weight");
  EXPECT_EQ(weights.find("model.norm.weight")->name, "output_norm.weight");
  EXPECT_EQ(weights.find("model.layers.0.self_attn.o_proj.weight")->name, "blk.0.attn_output.weight");
  EXPECT_EQ(weights.find("model.layers.0.mlp.down_proj.weight")->name, "blk.0.ffn_down.weight");
  EXPECT_EQ(weights.find("lm_head.weight"), nullptr);
  EXPECT_EQ(weights.find("model.layers.0.self_attn.q_proj.bias"), nullptr);
  for (const char* odd : {"", ".", "model.layers.", "model.layers.0", "model.layers.0.", "weight"}) {
    EXPECT_EQ(weights.find(odd), nullptr);
  }
  ASSERT_EQ(weights.files().size(), 1U);
  EXPECT_EQ(weights.files()[0].bytes, std::filesystem::file_size(folder_ / "m.gguf"));
}

TEST_F(WeightsTest, UndoesTheRowInterleavingOfLlamaGguf) {
  const Weights llama = Weights::open(write("m.gguf", model_gguf().str()));
  const std::array<std::int64_t, 8> expected{0, 2, 1, 3, 4, 6, 5, 7};
  for (std::int64_t row = 0; row < 8; ++row) {
    for (const char* name :
         {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
          "model.layers.0.self_attn.k_proj.bias"}) {
      EXPECT_EQ(llama.stored_row(name, row), expected[static_cast<std::size_t>(row)]);
    }
    EXPECT_EQ(llama.stored_row("model.layers.0.self_attn.v_proj.weight", row), row);
    EXPECT_EQ(llama.stored_row("model.embed_tokens.weight", row), row);
  }
  const Weights qwen = Weights::open(write("q.gguf", model_gguf("qwen2").str()));
  EXPECT_EQ(qwen.stored_row("model.layers.0.self_attn.q_proj.weight", 1), 1);
}

TEST_F(WeightsTest, MissingTensorThrows) {
  const auto path = write("m.gguf", model_gguf("llama", "model.layers.0.mlp.up_proj.weight").str());
  EXPECT_EQ(complaint_of([&] { Weights::open(path); }),
            path.string() +
                ": expected tensor 'model.layers.0.mlp.up_proj.weight' of shape [16, 8], got no such tensor");
}

TEST_F(WeightsTest, SingleSafetensorsFileThrows) {
  const auto path = write("model.safetensors", "");
  EXPECT_EQ(
      complaint_of([&] { Weights::open(path); }),
      path.string() +
          ": expected a GGUF file or the folder of a Hugging Face model, got one file of such a folder");
}

TEST_F(WeightsTest, WrongTensorShapeThrows) {
  GgufText text = model_gguf("llama", "model.layers.0.mlp.up_proj.weight");
  const auto path = write("m.gguf", text.tensor("blk.0.ffn_up.weight", {8, 16}).str());
  EXPECT_EQ(complaint_of([&] { Weights::open(path); }),
            path.string() + ": expected tensor 'blk.0.ffn_up.weight' of shape [16, 8], got [8, 16]");
}

TEST_F(WeightsTest, GgufNamesAreOneToOne) {
  ModelConfig config{.architecture = "qwen3",
                     .layers = 12,
                     .hidden = 8,
                     .intermediate = 16,
                     .heads = 2,
                     .kv_heads = 1,
                     .head_dim = 4,
                     .vocab = 10,
                     .rope = {},
                     .rope_divisors = {},
                     .moba = {}};
  config.qkv_bias = config.output_bias = config.mlp_bias = config.qk_norm = true;
  std::set<std::string> names;
  std::size_t count = 0;
  for_each_tensor(config, [&](const std::string& name, const std::vector<std::int64_t>&) {
    EXPECT_NE(gguf_name(name), name);
    names.insert(gguf_name(name));
    ++count;
  });
  EXPECT_EQ(names.size(), count);
  EXPECT_EQ(count, 3U + 12U * 18U);
  EXPECT_EQ(gguf_name("model.layers.11.self_attn.q_norm.weight"), "blk.11.attn_q_norm.weight");
}

}  // namespace
}  // namespace moba::llm
