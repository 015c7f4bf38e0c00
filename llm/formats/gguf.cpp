#include "llm/formats/gguf.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <fstream>
#include <limits>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "llm/error.h"
#include "llm/formats/mapped_file.h"
#include "llm/formats/quoted.h"
#include "llm/formats/sizes.h"

namespace moba::llm {

static_assert(std::endian::native == std::endian::little, "numbers are read as they lie in the file");

namespace {

constexpr std::string_view kMagic = "GGUF";

template <typename T>
T load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

const char* name_of(GgufType type) {
  constexpr const char* kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                    "bool", "string", "array", "u64", "i64", "f64"};
  return kNames[static_cast<std::size_t>(type)];
}

/// Returns the bytes of one value; 0 for types of variable length.
std::uint64_t width_of(GgufType type) {
  constexpr std::uint64_t kWidths[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kWidths[static_cast<std::size_t>(type)];
}

std::optional<Storage> storage_of(std::uint32_t ggml_type) {
  switch (ggml_type) {
    case 0:
      return Storage::f32;
    case 1:
      return Storage::f16;
    case 2:
      return Storage::q4_0;
    case 3:
      return Storage::q4_1;
    case 6:
      return Storage::q5_0;
    case 7:
      return Storage::q5_1;
    case 8:
      return Storage::q8_0;
    case 10:
      return Storage::q2_k;
    case 11:
      return Storage::q3_k;
    case 12:
      return Storage::q4_k;
    case 13:
      return Storage::q5_k;
    case 14:
      return Storage::q6_k;
    case 30:
      return Storage::bf16;
    default:
      return std::nullopt;
  }
}

/// Names of unsupported types, for the message.
std::string other_type(std::uint32_t ggml_type) {
  static const std::unordered_map<std::uint32_t, const char*> names{
      {9, "Q8_1"},   {15, "Q8_K"},   {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"},
      {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"},   {22, "IQ2_S"},  {23, "IQ4_XS"},
      {24, "I8"},    {25, "I16"},    {26, "I32"},     {27, "I64"},    {28, "F64"},
      {29, "IQ1_M"}, {34, "TQ1_0"},  {35, "TQ2_0"},   {39, "MXFP4"},  {40, "NVFP4"}};
  const auto name = names.find(ggml_type);
  return name == names.end() ? fmt::format("type {}", ggml_type) : name->second;
}

}  // namespace

struct GgufFile::Impl {
  explicit Impl(const std::filesystem::path& path) : file(path) {}

  MappedFile file;
  std::uint32_t version = 0;
  std::unordered_map<std::string_view, GgufValue> metadata;
  std::vector<StoredTensor> tensors;
};

/// Reads the headers of one file from front to back.
class GgufReader {
 public:
  explicit GgufReader(GgufFile::Impl& target) : target_(target), rest_(target.file.bytes()) {}

  void read() {
    read_version();
    const std::uint64_t tensors = take<std::uint64_t>("the number of tensors");
    const std::uint64_t entries = take<std::uint64_t>("the number of metadata entries");
    check_count(entries, kMinEntryBytes, "metadata entries");
    check_count(tensors, kMinTensorBytes, "tensors");
    for (std::uint64_t i = 0; i < entries; ++i) read_entry();
    refuse_parts();
    for (std::uint64_t i = 0; i < tensors; ++i) read_tensor();
    place_tensors();
  }

 private:
  static constexpr std::uint64_t kMinEntryBytes = 8 + 4 + 1;           // a key's length, a type, a byte
  static constexpr std::uint64_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;  // length, rank, a size, type, offset
  static constexpr std::uint32_t kMaxDimensions = 4;
  static constexpr std::uint64_t kDefaultAlignment = 32, kMaxAlignment = 1 << 20;

  [[noreturn]] void fail(std::string_view expected, std::string_view found) const {
    throw DataError(fmt::format("{}: expected {}, got {}", target_.file.name(), expected, found));
  }

  std::span<const std::byte> take_bytes(std::uint64_t count, std::string_view what) {
    if (count > rest_.size()) {
      fail(fmt::format("{} bytes for {} at byte {}", count, what, target_.file.bytes().size() - rest_.size()),
           fmt::format("{} before the end of the file", rest_.size()));
    }
    const auto bytes = rest_.first(count);
    rest_ = rest_.subspan(count);
    return bytes;
  }

  template <typename T>
  T take(std::string_view what) {
    return load<T>(take_bytes(sizeof(T), what).data());
  }

  std::string_view take_string(std::string_view what) {
    const std::uint64_t length = take<std::uint64_t>(what);
    const auto bytes = take_bytes(length, what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  void read_version() {
    const auto magic = rest_.first(std::min(kMagic.size(), rest_.size()));
    const std::string_view found(reinterpret_cast<const char*>(magic.data()), magic.size());
    if (found != kMagic) fail("a GGUF file", found.empty() ? "no bytes" : "bytes " + llm::quoted(found));
    take_bytes(kMagic.size(), "the mark of GGUF files");
    target_.version = take<std::uint32_t>("the version");
    if (target_.version == 2 || target_.version == 3) return;
    const bool is_swapped = target_.version != 0 && (target_.version & 0xFFFF) == 0;
    fail("GGUF version 2 or 3",
         is_swapped ? std::string("a big-endian file") : fmt::format("version {}", target_.version));
  }

  void check_count(std::uint64_t count, std::uint64_t min_bytes, std::string_view what) const {
    if (count <= rest_.size() / min_bytes) return;
    fail(fmt::format("at most {} {} in {} bytes", rest_.size() / min_bytes, what, rest_.size()),
         std::to_string(count));
  }

  GgufType take_type(std::string_view key) {
    const auto type = take<std::uint32_t>("a metadata type");
    if (type <= static_cast<std::uint32_t>(GgufType::f64)) return static_cast<GgufType>(type);
    fail(fmt::format("a metadata type from 0 to 12 for {}", llm::quoted(key)), std::to_string(type));
  }

  void read_entry() {
    GgufValue value;
    value.file_ = &target_.file.name();
    value.key_ = take_string("a metadata key");
    value.type_ = value.element_ = take_type(value.key_);
    if (value.type_ == GgufType::array) {
      value.element_ = take_type(value.key_);
      value.count_ = take<std::uint64_t>("the length of an array");
    }
    value.bytes_ = take_elements(value);
    if (!target_.metadata.emplace(value.key_, value).second) {
      fail("each metadata key once", llm::quoted(value.key_) + " twice");
    }
  }

  std::span<const std::byte> take_elements(const GgufValue& value) {
    const std::string what = "metadata " + llm::quoted(value.key_);
    if (value.element_ == GgufType::array) fail(what + " without nested arrays", "an array of arrays");
    if (value.element_ != GgufType::string) {
      const std::uint64_t width = width_of(value.element_);
      check_count(value.count_, width, "elements of " + what);
      return take_bytes(value.count_ * width, what);
    }
    check_count(value.count_, sizeof(std::uint64_t), "elements of " + what);
    const auto before = rest_;
    for (std::uint64_t i = 0; i < value.count_; ++i) take_string(what);
    return before.first(before.size() - rest_.size());
  }

  /// Throws DataError for a model that is split into several files.
  void refuse_parts() const {
    const auto count = target_.metadata.find("split.count");
    if (count == target_.metadata.end() || count->second.integer() <= 1) return;
    fail("a model in one file",
         fmt::format("one part of {}: merge them (llama-gguf-split --merge)", count->second.integer()));
  }

  void read_tensor() {
    StoredTensor tensor;
    tensor.name = take_string("a tensor's name");
    const std::string what = "tensor " + llm::quoted(tensor.name);
    const auto rank = take<std::uint32_t>(what);
    if (rank < 1 || rank > kMaxDimensions) {
      fail(fmt::format("1 to {} dimensions in {}", kMaxDimensions, what), std::to_string(rank));
    }
    for (std::uint32_t i = 0; i < rank; ++i) {
      const auto size = take<std::uint64_t>(what);
      if (size < 1 || size > std::numeric_limits<std::int64_t>::max()) {
        fail(fmt::format("sizes from 1 to 2^63 - 1 in {}", what), std::to_string(size));
      }
      tensor.shape.insert(tensor.shape.begin(), static_cast<std::int64_t>(size));
    }
    const auto type = take<std::uint32_t>(what);
    const auto storage = storage_of(type);
    if (!storage) {
      fail(fmt::format("F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K in {}", what),
           other_type(type));
    }
    tensor.storage = *storage;
    if (!names_.insert(tensor.name).second) fail("each tensor once", what + " twice");
    offsets_.push_back(take<std::uint64_t>(what));
    target_.tensors.push_back(std::move(tensor));
  }

  std::uint64_t alignment() const {
    const auto entry = target_.metadata.find("general.alignment");
    if (entry == target_.metadata.end()) return kDefaultAlignment;
    const std::int64_t alignment = entry->second.integer();
    if (alignment < 1 || static_cast<std::uint64_t>(alignment) > kMaxAlignment ||
        !std::has_single_bit(static_cast<std::uint64_t>(alignment))) {
      entry->second.fail(fmt::format("a power of two up to {}", kMaxAlignment), std::to_string(alignment));
    }
    return static_cast<std::uint64_t>(alignment);
  }

  /// Sets the bytes of every tensor: the data begin at the first aligned byte after the headers.
  void place_tensors() {
    const std::uint64_t align = alignment();
    const auto file = target_.file.bytes();
    const std::uint64_t headers = file.size() - rest_.size();
    const std::uint64_t begin = std::min((headers + align - 1) / align * align, file.size());
    const auto data = file.subspan(begin);
    for (std::size_t i = 0; i < target_.tensors.size(); ++i) {
      StoredTensor& tensor = target_.tensors[i];
      const std::string what = "tensor " + llm::quoted(tensor.name);
      const auto bytes = stored_bytes(tensor.storage, tensor.shape);
      const std::string kind =
          fmt::format("{} [{}]", llm::name_of(tensor.storage), fmt::join(tensor.shape, ", "));
      if (!bytes) fail(fmt::format("{} with rows of whole blocks and a size of 63 bits", what), kind);
      if (offsets_[i] % align != 0) {
        fail(fmt::format("{} at a multiple of {}", what, align), fmt::format("offset {}", offsets_[i]));
      }
      if (offsets_[i] > data.size() || *bytes > data.size() - offsets_[i]) {
        fail(fmt::format("{} ({}), {} bytes at offset {}", what, kind, *bytes, offsets_[i]),
             fmt::format("{} bytes of data", data.size()));
      }
      tensor.bytes = data.subspan(offsets_[i], *bytes);
    }
    refuse_overlaps();
  }

  void refuse_overlaps() const {
    std::vector<const StoredTensor*> in_order;
    for (const StoredTensor& tensor : target_.tensors) in_order.push_back(&tensor);
    std::sort(in_order.begin(), in_order.end(),
              [](const StoredTensor* a, const StoredTensor* b) { return a->bytes.data() < b->bytes.data(); });
    for (std::size_t i = 1; i < in_order.size(); ++i) {
      const StoredTensor &before = *in_order[i - 1], &after = *in_order[i];
      if (before.bytes.data() + before.bytes.size() > after.bytes.data()) {
        fail("tensors that do not overlap",
             fmt::format("{} and {} sharing bytes", llm::quoted(before.name), llm::quoted(after.name)));
      }
    }
  }

  GgufFile::Impl& target_;
  std::span<const std::byte> rest_;
  std::vector<std::uint64_t> offsets_;
  std::unordered_set<std::string> names_;
};

GgufFile GgufFile::open(const std::filesystem::path& path) {
  const auto impl = std::make_shared<Impl>(path);
  GgufReader(*impl).read();
  GgufFile file;
  file.impl_ = impl;
  return file;
}

bool GgufFile::is_gguf(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;
  char mark[kMagic.size()] = {};
  std::ifstream file(path, std::ios::binary);
  file.read(mark, sizeof mark);
  return file && std::string_view(mark, sizeof mark) == kMagic;
}

const std::string& GgufFile::name() const {
  return impl_->file.name();
}
std::uint32_t GgufFile::version() const {
  return impl_->version;
}
std::uint64_t GgufFile::bytes() const {
  return impl_->file.bytes().size();
}
const std::vector<StoredTensor>& GgufFile::tensors() const {
  return impl_->tensors;
}

std::optional<GgufValue> GgufFile::find(std::string_view key) const {
  const auto entry = impl_->metadata.find(key);
  if (entry == impl_->metadata.end()) return std::nullopt;
  return entry->second;
}

GgufValue GgufFile::at(std::string_view key) const {
  if (const auto value = find(key)) return *value;
  throw DataError(fmt::format("{}: expected metadata {}, got none", name(), llm::quoted(key)));
}

std::string GgufValue::where() const {
  return fmt::format("{}: metadata {}", *file_, llm::quoted(key_));
}

void GgufValue::fail(std::string_view expected, std::string_view found) const {
  throw DataError(fmt::format("{}: expected {}, got {}", where(), expected, found));
}

std::string GgufValue::kind() const {
  return is_array() ? fmt::format("an array of {} {}", count_, name_of(element_)) : name_of(type_);
}

void GgufValue::expect(bool is_right, std::string_view expected) const {
  if (!is_right) fail(expected, kind());
}

namespace {

bool is_integer(GgufType type) {
  return width_of(type) != 0 && type != GgufType::f32 && type != GgufType::f64 && type != GgufType::boolean;
}

bool is_number(GgufType type) {
  return is_integer(type) || type == GgufType::f32 || type == GgufType::f64;
}

/// Returns element `index`; u64 beyond 2^63 - 1 becomes negative.
std::int64_t integer_at(GgufType type, std::span<const std::byte> bytes, std::uint64_t index) {
  const std::byte* at = bytes.data() + index * width_of(type);
  switch (type) {
    case GgufType::u8:
      return load<std::uint8_t>(at);
    case GgufType::i8:
      return load<std::int8_t>(at);
    case GgufType::u16:
      return load<std::uint16_t>(at);
    case GgufType::i16:
      return load<std::int16_t>(at);
    case GgufType::u32:
      return load<std::uint32_t>(at);
    case GgufType::i32:
      return load<std::int32_t>(at);
    default:
      return load<std::int64_t>(at);
  }
}

double number_at(GgufType type, std::span<const std::byte> bytes, std::uint64_t index) {
  if (type == GgufType::f32) return load<float>(bytes.data() + index * sizeof(float));
  if (type == GgufType::f64) return load<double>(bytes.data() + index * sizeof(double));
  return static_cast<double>(integer_at(type, bytes, index));
}

}  // namespace

std::string_view GgufValue::string() const {
  expect(type_ == GgufType::string, "a string");
  constexpr std::size_t kLength = sizeof(std::uint64_t);
  return {reinterpret_cast<const char*>(bytes_.data()) + kLength, bytes_.size() - kLength};
}

bool GgufValue::boolean() const {
  expect(type_ == GgufType::boolean, "a bool");
  return load<std::uint8_t>(bytes_.data()) != 0;
}

std::int64_t GgufValue::integer() const {
  expect(is_integer(type_), "an integer");
  const std::int64_t value = integer_at(type_, bytes_, 0);
  if (type_ == GgufType::u64 && value < 0) {
    fail("an integer up to 2^63 - 1", std::to_string(static_cast<std::uint64_t>(value)));
  }
  return value;
}

double GgufValue::number() const {
  expect(is_number(type_), "a number");
  return number_at(type_, bytes_, 0);
}

std::vector<std::string_view> GgufValue::strings() const {
  expect(is_array() && element_ == GgufType::string, "an array of strings");
  std::vector<std::string_view> strings;
  strings.reserve(count_);
  for (const std::byte* at = bytes_.data(); strings.size() < count_;) {
    const auto length = load<std::uint64_t>(at);
    strings.emplace_back(reinterpret_cast<const char*>(at + sizeof length), length);
    at += sizeof length + length;
  }
  return strings;
}

std::vector<std::int64_t> GgufValue::integers() const {
  expect(is_array() && is_integer(element_), "an array of integers");
  std::vector<std::int64_t> values(count_);
  for (std::uint64_t i = 0; i < count_; ++i) values[i] = integer_at(element_, bytes_, i);
  return values;
}

std::vector<float> GgufValue::numbers() const {
  expect(is_array() && is_number(element_), "an array of numbers");
  std::vector<float> values(count_);
  for (std::uint64_t i = 0; i < count_; ++i) values[i] = static_cast<float>(number_at(element_, bytes_, i));
  return values;
}

}  // namespace moba::llm
