#include "app/flags.h"

#include <algorithm>
#include <charconv>
#include <thread>

namespace moba::app {
namespace {

std::int64_t layer_number(const char* flag, std::string_view text, std::string_view whole) {
  std::int64_t layer = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, layer);
  if (parsed.ec != std::errc() || parsed.ptr != end || layer < 0) {
    throw llm::UsageError(fmt::format("{}: expected layers such as 0,27-29, got '{}'", flag, whole));
  }
  return layer;
}

}  // namespace

std::int64_t size_from(const char* flag, std::string_view text, std::int64_t max) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  const std::string_view suffix(parsed.ptr, static_cast<std::size_t>(end - parsed.ptr));
  const std::map<std::string_view, int> shifts{{"", 0},   {"k", 10}, {"K", 10}, {"m", 20},
                                               {"M", 20}, {"g", 30}, {"G", 30}};
  const auto shift = shifts.find(suffix);
  if (parsed.ec != std::errc() || shift == shifts.end() || value < 1 || value > max >> shift->second) {
    throw llm::UsageError(fmt::format("{}: expected 1 to {}, such as 8k or 1m, got '{}'", flag, max, text));
  }
  return value << shift->second;
}

int threads_from(const std::optional<std::int64_t>& threads) {
  const auto cores = static_cast<std::int64_t>(std::max(1U, std::thread::hardware_concurrency()));
  return static_cast<int>(in_range("-t/--threads", threads, 1, 1024, cores));
}

std::vector<llm::LayerRange> layer_ranges(const char* flag, std::string_view text) {
  std::vector<llm::LayerRange> ranges;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view item = text.substr(begin, end - begin);
    const std::size_t dash = std::min(item.find('-'), item.size());
    const std::int64_t first = layer_number(flag, item.substr(0, dash), text);
    const std::int64_t last = dash < item.size() ? layer_number(flag, item.substr(dash + 1), text) : first;
    ranges.push_back({first, last});
    begin = end + 1;
  }
  return ranges;
}

}  // namespace moba::app
