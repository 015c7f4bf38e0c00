#include "llm/formats/weights.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>

#include "llm/error.h"
#include "llm/formats/gguf.h"
#include "llm/formats/json.h"
#include "llm/formats/quoted.h"
#include "llm/formats/read_config.h"
#include "llm/formats/safetensors.h"
#include "llm/formats/tensor_names.h"

namespace moba::llm {

struct Weights::Impl {
  std::string name;
  ModelConfig config;
  std::vector<WeightFile> files;
  std::vector<StoredTensor> tensors;
  std::unordered_map<std::string_view, const StoredTensor*> by_name;
  // The mappings of the tensors: one of the two.
  std::optional<GgufFile> gguf;
  std::vector<SafetensorsFile> safetensors;

  bool interleaves_rotary_halves() const { return gguf && config.architecture == "llama"; }

  void read_gguf(const std::filesystem::path& path) {
    gguf = GgufFile::open(path);
    config = read_config(*gguf);
    files.push_back({gguf->name(), gguf->bytes()});
    tensors = gguf->tensors();
  }

  void read_folder(const std::filesystem::path& folder) {
    const auto path = folder / "config.json";
    const nlohmann::json document = load_json(path);
    config = read_config(JsonValue(document, path.string()));
    if (std::filesystem::exists(folder / "model.safetensors")) {
      add_file(folder / "model.safetensors");
    } else if (std::filesystem::exists(folder / "model.safetensors.index.json")) {
      read_index(folder);
    } else {
      throw DataError(fmt::format(
          "{}: expected model.safetensors or model.safetensors.index.json, got neither", folder.string()));
    }
  }

  SafetensorsFile& add_file(const std::filesystem::path& path) {
    SafetensorsFile file = SafetensorsFile::open(path);
    files.push_back({file.file->name(), file.file->bytes().size()});
    tensors.insert(tensors.end(), file.tensors.begin(), file.tensors.end());
    return safetensors.emplace_back(std::move(file));
  }

  /// Reads a folder with an index; the files must hold the tensors that the index names.
  void read_index(const std::filesystem::path& folder) {
    const auto path = folder / "model.safetensors.index.json";
    const nlohmann::json document = load_json(path);
    const JsonValue map = JsonValue(document, path.string()).at("weight_map");
    std::map<std::string, std::size_t> counts;
    for (const auto& [tensor, file] : map.object()) ++counts[shard_name(map.at(tensor))];
    for (const auto& [shard, count] : counts) {
      const SafetensorsFile& file = add_file(folder / shard);
      for (const StoredTensor& tensor : file.tensors) {
        const auto entry = map.find(tensor.name);
        if (entry && entry->string() == shard) continue;
        throw DataError(fmt::format("{}: expected the tensors that {} names, got {} too", file.file->name(),
                                    path.filename().string(), llm::quoted(tensor.name)));
      }
      if (file.tensors.size() != count) {
        throw DataError(fmt::format("{}: expected {} tensors as {} says, got {}", file.file->name(), count,
                                    path.filename().string(), file.tensors.size()));
      }
    }
  }

  /// Returns the name of a file, which must be in the folder of the index.
  static std::string shard_name(const JsonValue& value) {
    const std::string& shard = value.string();
    const bool is_plain = !shard.empty() && shard != "." && shard != ".." &&
                          shard.find('/') == std::string::npos && shard.find('\0') == std::string::npos;
    if (!is_plain) value.fail("the name of a file in the same folder", llm::quoted(shard));
    return shard;
  }

  const StoredTensor* find(std::string_view wanted) const {
    const auto tensor = by_name.find(gguf ? gguf_name(wanted) : std::string(wanted));
    return tensor == by_name.end() ? nullptr : tensor->second;
  }

  [[noreturn]] void fail(const std::string& expected, const std::string& found) const {
    throw DataError(fmt::format("{}: expected {}, got {}", name, expected, found));
  }

  void check_tensors() const {
    for_each_tensor(config, [this](const std::string& wanted, const std::vector<std::int64_t>& shape) {
      const StoredTensor* tensor = find(wanted);
      const std::string kind = fmt::format(
          "tensor {} of shape [{}]", llm::quoted(tensor ? tensor->name : wanted), fmt::join(shape, ", "));
      if (!tensor) fail(kind, "no such tensor");
      if (tensor->shape != shape) fail(kind, fmt::format("[{}]", fmt::join(tensor->shape, ", ")));
    });
  }
};

Weights Weights::open(const std::filesystem::path& path) {
  const auto impl = std::make_shared<Impl>();
  impl->name = path.string();
  if (std::filesystem::is_directory(path)) {
    impl->read_folder(path);
  } else if (path.extension() == ".safetensors") {
    impl->fail("a GGUF file or the folder of a Hugging Face model", "one file of such a folder");
  } else {
    impl->read_gguf(path);
  }
  for (const StoredTensor& tensor : impl->tensors) impl->by_name.emplace(tensor.name, &tensor);
  check_heads(impl->config, impl->name);
  impl->check_tensors();
  Weights weights;
  weights.impl_ = impl;
  return weights;
}

const ModelConfig& Weights::config() const {
  return impl_->config;
}
const std::vector<WeightFile>& Weights::files() const {
  return impl_->files;
}
const std::vector<StoredTensor>& Weights::tensors() const {
  return impl_->tensors;
}
const StoredTensor* Weights::find(std::string_view name) const {
  return impl_->find(name);
}

std::int64_t Weights::stored_row(std::string_view name, std::int64_t row) const {
  if (!impl_->interleaves_rotary_halves()) return row;
  const std::string_view stem = name.substr(0, name.rfind('.'));
  if (!stem.ends_with("self_attn.q_proj") && !stem.ends_with("self_attn.k_proj")) return row;
  const std::int64_t size = impl_->config.head_dim, half = size / 2;
  const std::int64_t head = row / size, within = row % size;
  return head * size + within % half * 2 + within / half;
}

}  // namespace moba::llm
