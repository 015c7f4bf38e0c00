#include "llm/session/session_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <optional>
#include <string_view>

#include "llm/error.h"

namespace moba::llm {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

/// LibTorch and its buffers, the tokenizer, and the scratch memory of the attention.
constexpr std::int64_t kProgramBytes = std::int64_t{384} << 20;

/// Returns the number after `key` at the begin of a line; without a key, that of the first line.
std::optional<std::int64_t> number_in(const fs::path& path, std::string_view key = "") {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const std::size_t digits = line.find_first_not_of(' ', key.size());
    if (digits == std::string::npos) return std::nullopt;
    std::int64_t number = 0;
    const auto parsed = std::from_chars(line.data() + digits, line.data() + line.size(), number);
    return parsed.ec == std::errc() ? std::optional(number) : std::nullopt;  // "max" has no digits
  }
  return std::nullopt;
}

/// The names of a control group's files.
struct GroupFiles {
  const char *limit, *usage, *cache;
};

/// Returns what the group of `path` below `mount` and those around it leave.
std::int64_t left_by_groups(const fs::path& mount, const fs::path& path, const GroupFiles& files) {
  std::int64_t left = kUnlimited;
  for (fs::path group = path.relative_path();; group = group.parent_path()) {
    const fs::path folder = mount / group;
    const auto limit = number_in(folder / files.limit), usage = number_in(folder / files.usage);
    if (limit && usage) {
      const std::int64_t cache = number_in(folder / "memory.stat", files.cache).value_or(0);
      left = std::min(left, std::max<std::int64_t>(0, *limit - *usage + std::min(cache, *usage)));
    }
    if (group.empty()) return left;
  }
}

std::int64_t left_by_groups(const fs::path& root) {
  std::int64_t left = kUnlimited;
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers =
        fmt::format(",{},", std::string_view(line).substr(first + 1, second - first - 1));
    const fs::path path = line.substr(second + 1);
    if (controllers == ",,") {  // version 2
      left = std::min(left, left_by_groups(root / "sys/fs/cgroup", path,
                                           {"memory.max", "memory.current", "inactive_file "}));
    } else if (controllers.find(",memory,") != std::string::npos) {
      left = std::min(
          left, left_by_groups(root / "sys/fs/cgroup/memory", path,
                               {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "}));
    }
  }
  return left;
}

double gib(std::int64_t bytes) {
  return static_cast<double>(bytes) / (std::int64_t{1} << 30);
}

}  // namespace

std::int64_t available_memory(const fs::path& root) {
  const auto kib = number_in(root / "proc/meminfo", "MemAvailable:");
  return std::min(kib ? *kib * 1024 : kUnlimited, left_by_groups(root));
}

SessionMemory session_memory(const Weights& weights, const Arithmetic& arithmetic,
                             const SessionSettings& settings) {
  const ModelConfig& c = weights.config();
  const auto value = static_cast<std::int64_t>(size_of(arithmetic.dtype));
  SessionMemory memory{.fixed = kProgramBytes};
  for (const StoredTensor& tensor : weights.tensors())
    memory.fixed += static_cast<std::int64_t>(tensor.bytes.size());
  const std::int64_t heads = c.heads * c.head_dim, kv_heads = c.kv_heads * c.head_dim;
  // Residual stream, normed, queries with keys and values, attended, gate with up.
  memory.fixed += settings.chunk * (2 * c.hidden + 2 * heads + 2 * kv_heads + 2 * c.intermediate) * value;

  const DType kv_dtype = settings.kv_dtype.value_or(arithmetic.dtype);
  const std::int64_t scales = kv_dtype == DType::i8 ? c.kv_heads * 4 : 0;
  for (const Routing& routing :
       layer_routings(settings.moba, settings.layers, settings.full_layers, c.layers)) {
    memory.token += 2 * (kv_heads * static_cast<std::int64_t>(size_of(kv_dtype)) + scales) +
                    kv_heads * 4 / routing.block_size;
  }
  return memory;
}

void check_memory(const std::string& model, const SessionMemory& memory, std::int64_t tokens,
                  std::int64_t available) {
  if (memory.fixed > available) {
    throw DataError(
        fmt::format("{}: expected weights and working memory of at most {:.2f} GiB, got {:.2f} GiB", model,
                    gib(available), gib(memory.fixed)));
  }
  const std::int64_t max_tokens = (available - memory.fixed) / memory.token;
  if (tokens > max_tokens) {
    throw DataError(fmt::format(
        "{}: expected at most {} tokens of prompt and answer in {:.2f} GiB of memory, got {} tokens", model,
        max_tokens, gib(available), tokens));
  }
}

}  // namespace moba::llm
