#include "llm/formats/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "llm/error.h"
#include "llm/formats/json.h"
#include "llm/formats/quoted.h"
#include "llm/formats/sizes.h"

namespace moba::llm {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the format's own reader

Storage storage_of(const JsonValue& dtype) {
  const std::string& name = dtype.string();
  if (name == "F32") return Storage::f32;
  if (name == "F16") return Storage::f16;
  if (name == "BF16") return Storage::bf16;
  dtype.fail("F32, F16 or BF16", llm::quoted(name));
}

std::int64_t natural(const JsonValue& value) {
  const std::int64_t number = value.integer();
  if (number < 0) value.fail("0 or more", std::to_string(number));
  return number;
}

StoredTensor read_tensor(const std::string& name, const JsonValue& entry, std::span<const std::byte> data) {
  StoredTensor tensor;
  tensor.name = name;
  tensor.storage = storage_of(entry.at("dtype"));
  const JsonValue shape = entry.at("shape"), offsets = entry.at("data_offsets");
  for (std::size_t i = 0; i < shape.array().size(); ++i) tensor.shape.push_back(natural(shape.element(i)));
  if (offsets.array().size() != 2)
    offsets.fail("[begin, end]", fmt::format("{} numbers", offsets.array().size()));
  const auto begin = static_cast<std::uint64_t>(natural(offsets.element(0)));
  const auto end = static_cast<std::uint64_t>(natural(offsets.element(1)));
  const auto bytes = stored_bytes(tensor.storage, tensor.shape);
  const std::string kind = fmt::format("{} [{}]", name_of(tensor.storage), fmt::join(tensor.shape, ", "));
  if (!bytes) shape.fail("a size of 63 bits", kind);
  if (begin > end || end > data.size()) {
    offsets.fail(fmt::format("a range in the {} bytes of data", data.size()),
                 fmt::format("[{}, {}]", begin, end));
  }
  if (end - begin != *bytes) {
    offsets.fail(fmt::format("{} bytes for {}", *bytes, kind), fmt::format("{}", end - begin));
  }
  tensor.bytes = data.subspan(begin, *bytes);
  return tensor;
}

/// Sorts into file order. Throws DataError for gaps and overlaps between tensors.
void check_tiling(std::vector<StoredTensor>& tensors, std::span<const std::byte> data,
                  const std::string& file) {
  std::sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::pair(a.bytes.data(), a.bytes.size()) < std::pair(b.bytes.data(), b.bytes.size());
  });
  const std::byte* next = data.data();
  for (const StoredTensor& tensor : tensors) {
    if (tensor.bytes.data() != next) {
      throw DataError(fmt::format("{}: expected tensor {} at byte {} of the data, got it at {}, {}", file,
                                  llm::quoted(tensor.name), next - data.data(),
                                  tensor.bytes.data() - data.data(),
                                  tensor.bytes.data() < next ? "overlapping another" : "after a gap"));
    }
    next += tensor.bytes.size();
  }
  if (next != data.data() + data.size()) {
    throw DataError(fmt::format("{}: expected {} bytes of data, all that the header names, got {}", file,
                                next - data.data(), data.size()));
  }
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  const auto file = std::make_shared<const MappedFile>(path);
  const auto bytes = file->bytes();
  std::uint64_t length = 0;
  if (bytes.size() < sizeof length) {
    throw DataError(fmt::format("{}: expected a safetensors file, got {} bytes", file->name(), bytes.size()));
  }
  std::memcpy(&length, bytes.data(), sizeof length);
  const std::uint64_t max_length = std::min<std::uint64_t>(bytes.size() - sizeof length, kMaxHeaderBytes);
  if (length > max_length) {
    throw DataError(fmt::format("{}: expected a safetensors header of at most {} bytes, got a length of {}",
                                file->name(), max_length, length));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + sizeof length, length);
  const nlohmann::json header = parse_json(text, file->name());
  const auto data = bytes.subspan(sizeof length + length);

  SafetensorsFile result{file, {}};
  const JsonValue root(header, file->name());
  for (const auto& [name, entry] : root.object()) {
    if (name == "__metadata__") continue;
    result.tensors.push_back(read_tensor(name, root.at(name), data));
  }
  check_tiling(result.tensors, data, file->name());
  return result;
}

}  // namespace moba::llm
