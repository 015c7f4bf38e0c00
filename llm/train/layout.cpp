#include "llm/train/layout.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "llm/formats/tensor_names.h"

namespace moba::llm::train {

void Layout::add(const std::string& name, const std::vector<std::int64_t>& shape) {
  const std::int64_t count =
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  entries_.push_back({name, shape, size_, count});
  size_ += count;
  if (shape.size() > 1) matrices_ = size_;
}

const Layout::Entry& Layout::at(std::string_view name) const {
  return *std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.name == name; });
}

Layout layout_of(const ModelConfig& config) {
  Layout layout;
  for (const bool matrices : {true, false}) {
    for_each_tensor(config, [&](const std::string& name, const std::vector<std::int64_t>& shape) {
      if ((shape.size() > 1) == matrices) layout.add(name, shape);
    });
  }
  return layout;
}

}  // namespace moba::llm::train
