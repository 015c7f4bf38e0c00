#include "app/info.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "app/commands.h"
#include "app/flags.h"
#include "app/model_summary.h"
#include "app/program.h"
#include "llm/error.h"
#include "llm/formats/gguf.h"
#include "llm/formats/json.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"
#include "llm/formats/weights.h"
#include "llm/tokenizer/tokenizer.h"

namespace moba::app {
namespace {

namespace fs = std::filesystem;

/// The surroundings of the weights: parts of the file or folder, not of the model.
struct Surroundings {
  std::string format, tokenizer = "none";
  std::string chat_template;
};

std::string tokenizer_of(const llm::GgufFile& file) {
  const auto model = file.find("tokenizer.ggml.model");
  if (!model) return "none";
  const std::string_view name = model->string();
  const auto splitter = file.find("tokenizer.ggml.pre");
  if (name == "llama") return "SentencePiece BPE";
  if (name == "gpt2") return fmt::format("byte-level BPE ({})", splitter ? splitter->string() : "default");
  return std::string(name);
}

Surroundings surroundings_of(const llm::GgufFile& file) {
  const auto chat = file.find("tokenizer.chat_template");
  return {fmt::format("GGUF version {}", file.version()), tokenizer_of(file),
          std::string(chat ? chat->string() : "")};
}

/// A template's source: a text, or a list of named ones of which `default` counts.
std::string template_from(const llm::JsonValue& value) {
  if (!value.value().is_array()) return value.string();
  for (std::size_t i = 0; i < value.array().size(); ++i) {
    const llm::JsonValue named = value.element(i);
    if (named.at("name").string() == "default") return named.at("template").string();
  }
  return "";
}

std::string template_of(const fs::path& folder) {
  if (fs::exists(folder / "chat_template.jinja")) {
    const llm::MappedFile file(folder / "chat_template.jinja");
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }
  const fs::path path = folder / "tokenizer_config.json";
  if (!fs::exists(path)) return "";
  const nlohmann::json document = llm::load_json(path);
  const auto chat = llm::JsonValue(document, path.string()).find("chat_template");
  return chat ? template_from(*chat) : "";
}

Surroundings surroundings_of(const fs::path& folder) {
  Surroundings found{"safetensors", "none", template_of(folder)};
  for (const char* name : {"tokenizer.model", "tokenizer.json"}) {
    if (fs::exists(folder / name)) found.tokenizer = name;
  }
  return found;
}

Surroundings surroundings_of_model(const fs::path& model) {
  return fs::is_directory(model) ? surroundings_of(model) : surroundings_of(llm::GgufFile::open(model));
}

std::uint64_t bytes_of(const llm::Weights& weights) {
  std::uint64_t bytes = 0;
  for (const llm::WeightFile& file : weights.files()) bytes += file.bytes;
  return bytes;
}

const char* name_of(llm::RopeScaling::Kind kind) {
  switch (kind) {
    case llm::RopeScaling::Kind::none:
      return "none";
    case llm::RopeScaling::Kind::linear:
      return "linear";
    case llm::RopeScaling::Kind::llama3:
      return "llama3";
    case llm::RopeScaling::Kind::yarn:
      return "yarn";
  }
  return "?";
}

Json rope_json(const llm::ModelConfig& config) {
  using Kind = llm::RopeScaling::Kind;
  const llm::RopeScaling& scaling = config.rope;
  Json rope{{"theta", config.rope_theta}, {"scaling", name_of(scaling.kind)}};
  if (scaling.kind != Kind::none) rope["factor"] = scaling.factor;
  if (scaling.kind == Kind::llama3 || scaling.kind == Kind::yarn)
    rope["original_context"] = scaling.original_context;
  if (scaling.kind == Kind::llama3) {
    rope["low_freq_factor"] = scaling.low_freq_factor;
    rope["high_freq_factor"] = scaling.high_freq_factor;
  }
  if (scaling.kind == Kind::yarn) {
    rope["beta_fast"] = scaling.beta_fast;
    rope["beta_slow"] = scaling.beta_slow;
    if (scaling.attention_factor) rope["attention_factor"] = *scaling.attention_factor;
    if (scaling.mscale) rope["mscale"] = *scaling.mscale;
    if (scaling.mscale_all_dim) rope["mscale_all_dim"] = *scaling.mscale_all_dim;
    rope["truncate"] = scaling.truncate;
  }
  if (!config.rope_divisors.empty()) rope["divisors"] = config.rope_divisors;
  return rope;
}

Json to_json(const InfoOptions& options, const llm::Weights& weights, const Surroundings& around) {
  const llm::ModelConfig& config = weights.config();
  Json json{{"model", options.model},
            {"format", around.format},
            {"files", Json::array()},
            {"file_bytes", bytes_of(weights)},
            {"architecture", config.architecture},
            {"parameters", parameter_count(weights)},
            {"layers", config.layers},
            {"hidden", config.hidden},
            {"intermediate", config.intermediate},
            {"heads", config.heads},
            {"kv_heads", config.kv_heads},
            {"head_dim", config.head_dim},
            {"vocab", config.vocab},
            {"context", config.context},
            {"norm_eps", config.norm_eps},
            {"rope", rope_json(config)},
            {"qkv_bias", config.qkv_bias},
            {"output_bias", config.output_bias},
            {"mlp_bias", config.mlp_bias},
            {"qk_norm", config.qk_norm},
            {"tied_embeddings", config.tied_embeddings},
            {"storage", Json::array()},
            {"tokenizer", around.tokenizer},
            {"chat_template", llm::chat_form(around.chat_template)}};
  for (const llm::WeightFile& file : weights.files()) json["files"].push_back(file.name);
  for (const auto& [storage, share] : storage_mix(weights)) {
    json["storage"].push_back(
        {{"type", name_of(storage)}, {"tensors", share.tensors}, {"bytes", share.bytes}});
  }
  if (!options.tensors) return json;
  for (const llm::StoredTensor& tensor : weights.tensors()) {
    json["tensors"].push_back({{"name", tensor.name},
                               {"type", name_of(tensor.storage)},
                               {"shape", tensor.shape},
                               {"bytes", tensor.bytes.size()}});
  }
  return json;
}

std::string rope_text(const llm::ModelConfig& config) {
  const llm::RopeScaling& scaling = config.rope;
  std::string text = fmt::format("theta {}", config.rope_theta);
  if (scaling.kind != llm::RopeScaling::Kind::none) {
    text += fmt::format(", {} scaling by {}", name_of(scaling.kind), scaling.factor);
  }
  if (scaling.original_context != 0) text += fmt::format(" from {} tokens", scaling.original_context);
  if (!config.rope_divisors.empty()) text += ", divisors for each frequency";
  return text;
}

std::string extras_text(const llm::ModelConfig& config) {
  std::vector<const char*> extras;
  if (config.tied_embeddings) extras.push_back("tied embeddings");
  if (config.qkv_bias) extras.push_back("QKV bias");
  if (config.output_bias) extras.push_back("output bias");
  if (config.mlp_bias) extras.push_back("MLP bias");
  if (config.qk_norm) extras.push_back("q/k norm");
  return extras.empty() ? "none" : fmt::format("{}", fmt::join(extras, ", "));
}

std::string tensor_lines(const llm::Weights& weights) {
  std::string text = "\n";
  for (const llm::StoredTensor& tensor : weights.tensors()) {
    text += fmt::format("{:<48} {:<5} {:>10}  [{}]\n", llm::one_line(tensor.name), name_of(tensor.storage),
                        bytes_text(tensor.bytes.size()), fmt::join(tensor.shape, ", "));
  }
  return text;
}

std::string table(const InfoOptions& options, const llm::Weights& weights, const Surroundings& around) {
  const llm::ModelConfig& config = weights.config();
  std::string text;
  const auto line = [&](std::string_view label, const auto& value) {
    text += fmt::format("{:<14} {}\n", label, value);
  };
  line("model", options.model);
  line("format", fmt::format("{}, {} in {} file{}", around.format, bytes_text(bytes_of(weights)),
                             weights.files().size(), weights.files().size() == 1 ? "" : "s"));
  line("architecture", config.architecture);
  line("parameters", count_text(parameter_count(weights)));
  line("layers", config.layers);
  line("hidden", fmt::format("{}, feed-forward {}", config.hidden, config.intermediate));
  line("heads",
       fmt::format("{}, key/value heads {}, head size {}", config.heads, config.kv_heads, config.head_dim));
  line("context", fmt::format("{} tokens", config.context));
  line("vocabulary", config.vocab);
  line("rope", rope_text(config));
  line("extras", extras_text(config));
  for (const auto& [storage, share] : storage_mix(weights)) {
    line("weights",
         fmt::format("{:<5} {:>5} tensors {:>10}", name_of(storage), share.tensors, bytes_text(share.bytes)));
  }
  line("tokenizer", llm::one_line(around.tokenizer));
  line("chat template", llm::chat_form(around.chat_template));
  return options.tensors ? text + tensor_lines(weights) : text;
}

}  // namespace

int run_info(const InfoOptions& options) {
  const llm::Weights weights = llm::Weights::open(options.model);
  const Surroundings around = surroundings_of_model(options.model);
  if (options.json) {
    print(to_json(options, weights, around).dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
  } else {
    print(table(options, weights, around));
  }
  return 0;
}

CLI::App* add_info(CLI::App& parent, std::function<int()>& action) {
  CLI::App* command = parent.add_subcommand("info", "Show what a weights file holds, from its headers alone");
  const auto table = std::make_shared<FlagTable>(*command);
  const auto options = std::make_shared<InfoOptions>();
  const Words<bool> outputs{{"table", false}, {"json", true}};
  table->value("-m,--model", options->model, "PATH", "Model: a GGUF file or a Hugging Face folder")
      .required();
  table->toggle("--tensors", options->tensors, "List every tensor too");
  table->choice("-o,--output", options->json, outputs, "Output format");
  table->toggle("--json", options->json, "Same as -o json").excludes("--output");
  command->footer("Example:\n  moba info -m SmolLM2-135M-Instruct.Q4_1.gguf --tensors");
  command->callback([=, &action] { action = [=, keep = table] { return run_info(*options); }; });
  return command;
}

}  // namespace moba::app
