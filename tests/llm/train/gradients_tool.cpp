// Computes gradients for the tests: reads token ids and targets (int32) from files, and writes the loss of
// every token and the gradient of their mean, under the names of the weights.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "llm/formats/write_safetensors.h"
#include "llm/train/model.h"

namespace {

namespace train = moba::llm::train;

std::vector<std::int32_t> read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* first = reinterpret_cast<const std::int32_t*>(bytes.data());
  return {first, first + bytes.size() / sizeof(std::int32_t)};
}

struct Flags {
  std::string model, ids, targets, out;
  std::vector<std::int32_t> lengths;
  std::int64_t block_size = 0, top_k = 0, lora_rank = 0;
  std::vector<std::int64_t> full_layers;
  train::ModelSettings computing;
};

int run(Flags& flags) {
  const moba::llm::Weights weights = moba::llm::Weights::open(flags.model);
  train::Batch batch{.tokens = read_all(flags.ids), .targets = read_all(flags.targets)};
  for (const std::int32_t length : flags.lengths)
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + length);
  const auto layers = static_cast<std::size_t>(weights.config().layers);
  std::vector<moba::Routing> routings(layers, moba::Routing::full());
  if (flags.block_size > 0) {
    const moba::Routing sparse{.block_size = flags.block_size, .top_k = flags.top_k};
    routings.assign(layers, sparse);
    for (const std::int64_t layer : flags.full_layers)
      routings[static_cast<std::size_t>(layer)] = moba::Routing::full();
  }
  if (flags.lora_rank > 0) flags.computing.lora = {.rank = flags.lora_rank, .alpha = 2.0};
  flags.computing.max_tokens = batch.size();
  train::Model model(weights.config(), flags.computing);
  model.load(weights);
  const train::Parameters trained = model.trained();
  if (flags.lora_rank > 0) {  // B too away from 0, so that A has a gradient
    for (std::size_t i = 0; i < trained.values.size(); ++i)
      trained.values[i] =
          0.02f * static_cast<float>(static_cast<std::int64_t>(i * 2654435761u % 1009) - 504) / 504.0f;
    model.values_changed();
  }

  const auto counted = batch.size() - std::count(batch.targets.begin(), batch.targets.end(), -1);
  const std::vector<float> losses =
      model.forward_backward(batch, routings, 1.0f / static_cast<float>(counted));
  std::vector<moba::llm::NamedTensor> tensors{{"losses", {batch.size()}, losses}};
  const auto part = [](std::span<float> values, const train::Layout::Entry& entry) {
    return values.subspan(static_cast<std::size_t>(entry.offset), static_cast<std::size_t>(entry.count));
  };
  for (const auto& entry : trained.layout->entries()) {
    tensors.push_back({entry.name, entry.shape, part(trained.gradients, entry)});
    if (flags.lora_rank > 0)
      tensors.push_back({"value/" + entry.name, entry.shape, part(trained.values, entry)});
  }
  moba::llm::write_safetensors(flags.out, tensors);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Losses and gradients of one batch");
  Flags flags;
  flags.computing.threads = 2;
  app.add_option("--model", flags.model)->required();
  app.add_option("--ids", flags.ids)->required();
  app.add_option("--targets", flags.targets)->required();
  app.add_option("--out", flags.out)->required();
  app.add_option("--lengths", flags.lengths)->delimiter(',')->required();
  app.add_option("--block-size", flags.block_size);
  app.add_option("--top-k", flags.top_k);
  app.add_option("--full-layers", flags.full_layers)->delimiter(',');
  app.add_option("--lora-rank", flags.lora_rank);
  app.add_option("--threads", flags.computing.threads);
  app.add_flag("--recompute", flags.computing.recompute);
  app.add_flag_callback("--bf16", [&] { flags.computing.dtype = moba::DType::bf16; });
  try {
    app.parse(argc, argv);
    return run(flags);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gradients: %s\n", error.what());
    return 1;
  }
}
