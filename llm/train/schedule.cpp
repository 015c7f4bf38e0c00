#include "llm/train/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <string_view>
#include <utility>

#include "llm/error.h"

namespace moba::llm::train {

double LearningRate::at(std::int64_t step) const {
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const auto share = [](std::int64_t part, std::int64_t whole) {
    return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0.0;
  };
  switch (kind) {
    case Kind::cosine: {
      const double fallen = 0.5 - 0.5 * std::cos(std::numbers::pi * share(step - warmup, steps - warmup));
      return peak * (1 - (1 - floor) * fallen);
    }
    case Kind::wsd: {
      const std::int64_t begin = steps - decay;
      return step < begin ? peak : peak * (1 - (1 - floor) * share(step - begin, decay));
    }
    case Kind::constant:
      break;
  }
  return peak;
}

AttentionSchedule::AttentionSchedule(std::vector<Part> parts) : parts_(std::move(parts)) {}

AttentionSchedule AttentionSchedule::parse(const char* flag, const std::string& text) {
  std::vector<Part> parts;
  double sum = 0;
  const auto fail = [&](const std::string& expected) {
    throw UsageError(fmt::format("{}: expected {}, got '{}'", flag, expected, text));
  };
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view item = std::string_view(text).substr(begin, end - begin);
    const std::size_t colon = std::min(item.find(':'), item.size());
    const std::string_view mode = item.substr(0, colon),
                           number = item.substr(std::min(colon + 1, item.size()));
    double share = 0;
    const auto parsed = std::from_chars(number.data(), number.data() + number.size(), share);
    const bool is_number = parsed.ec == std::errc() && parsed.ptr == number.data() + number.size();
    if ((mode != "full" && mode != "moba") || !is_number || !(share > 0))
      fail("modes with shares above 0, such as moba:0.9,full:0.1");
    parts.push_back({mode == "full" ? AttentionMode::full : AttentionMode::moba, share});
    sum += share;
    begin = end + 1;
  }
  if (!(std::abs(sum - 1) <= 1e-6)) fail(fmt::format("shares that add up to 1, not to {:.6g}", sum));
  return AttentionSchedule(std::move(parts));
}

AttentionMode AttentionSchedule::at(std::int64_t step, std::int64_t steps) const {
  double end = 0;
  for (const Part& part : parts_) {
    end += part.share;
    // Rounded: 0.9 of 10 steps is 9 in spite of binary fractions.
    if (step < std::llround(end * static_cast<double>(steps))) return part.attend;
  }
  return parts_.back().attend;
}

bool AttentionSchedule::uses(AttentionMode attend) const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const Part& part) { return part.attend == attend; });
}

}  // namespace moba::llm::train
