// Computes logits for the tests: reads token ids (int32) from one file, and writes the logits after each of
// them (f32, [tokens, vocab]) to another.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "llm/session/session.h"

namespace {

using moba::DType;
using moba::llm::AttentionMode;

const std::map<std::string, AttentionMode> kModes{
    {"full", AttentionMode::full}, {"moba", AttentionMode::moba}, {"moba-naive", AttentionMode::moba_naive}};
const std::map<std::string, DType> kDTypes{
    {"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"i8", DType::i8}};

template <typename T>
std::vector<T> read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const T* first = reinterpret_cast<const T*>(bytes.data());
  return {first, first + bytes.size() / sizeof(T)};
}

int run(const std::string& model, const std::string& ids_path, const std::string& out_path, DType dtype,
        std::int64_t prefilled, const moba::llm::SessionSettings& settings) {
  const std::vector<std::int32_t> ids = read_all<std::int32_t>(ids_path);
  moba::llm::use_threads(settings.threads);
  moba::llm::Session session(moba::llm::Model::load(moba::llm::Weights::open(model), {.dtype = dtype}),
                             settings);

  std::ofstream out(out_path, std::ios::binary);
  const auto write = [&](const std::vector<float>& logits) {
    out.write(reinterpret_cast<const char*>(logits.data()),
              static_cast<std::streamsize>(logits.size() * sizeof(float)));
  };
  const std::span<const std::int32_t> all(ids);
  const std::size_t prompt = prefilled < 0 ? ids.size() : static_cast<std::size_t>(prefilled);
  write(session.prefill(all.first(prompt), {}, moba::llm::Logits::all));
  for (std::int32_t id : all.subspan(prompt)) write(session.decode(id));
  return out ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Logits of every token");
  std::string model, ids, out;
  DType dtype = DType::f32;
  std::int64_t prefilled = -1;
  moba::llm::SessionSettings settings;
  settings.full_tail = 0;
  std::vector<std::int64_t> full_layers;
  app.add_option("--model", model)->required();
  app.add_option("--ids", ids)->required();
  app.add_option("--out", out)->required();
  app.add_option("--dtype", dtype)->transform(CLI::CheckedTransformer(kDTypes));
  app.add_option("--kv-dtype", settings.kv_dtype)->transform(CLI::CheckedTransformer(kDTypes));
  app.add_option("--prefilled", prefilled, "Tokens read as a prompt; the others are decoded one by one");
  app.add_option("--chunk", settings.chunk);
  app.add_option("--attn", settings.prefill)->transform(CLI::CheckedTransformer(kModes));
  app.add_option("--decode", settings.decode)->transform(CLI::CheckedTransformer(kModes));
  app.add_option("--block-size", settings.moba.block_size);
  app.add_option("--top-k", settings.moba.top_k);
  app.add_option("--sink", settings.moba.sink_blocks);
  app.add_option("--full-tail", settings.full_tail);
  app.add_option("--full-layers", full_layers)->delimiter(',');
  app.add_option("--threads", settings.threads);
  try {
    app.parse(argc, argv);
    for (std::int64_t layer : full_layers) settings.full_layers.push_back({layer, layer});
    return run(model, ids, out, dtype, prefilled, settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "logits: %s\n", error.what());
    return 1;
  }
}
