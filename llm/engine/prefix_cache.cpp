#include "llm/engine/prefix_cache.h"

#include <algorithm>
#include <iterator>

namespace moba::llm {

bool PrefixCache::Less::operator()(std::span<const std::int32_t> a, std::span<const std::int32_t> b) const {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

PrefixCache::Place PrefixCache::root(std::string_view variant) {
  const auto found = roots_.find(variant);
  Place place;
  place.children_ = found != roots_.end() ? &found->second : &roots_[std::string(variant)];
  return place;
}

std::span<const std::int32_t> PrefixCache::page_of(std::span<const std::int32_t> tokens,
                                                   std::size_t index) const {
  const auto size = static_cast<std::size_t>(page_tokens_);
  return tokens.subspan(index * size, size);
}

std::vector<Page> PrefixCache::match(Place& place, std::span<const std::int32_t> tokens) const {
  std::vector<Page> pages;
  const std::size_t count = tokens.size() / static_cast<std::size_t>(page_tokens_);
  while (pages.size() < count) {
    const auto next = place.children_->find(page_of(tokens, pages.size()));
    if (next == place.children_->end()) break;
    place.node_ = next->second;
    place.children_ = &place.node_->children;
    pages.push_back(place.node_->page);
  }
  return pages;
}

void PrefixCache::insert(Place& place, std::span<const std::int32_t> tokens, std::span<Page> pages) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const std::span<const std::int32_t> key = page_of(tokens, i);
    auto found = place.children_->find(key);
    if (found == place.children_->end()) {
      Node& node = nodes_.emplace_front();
      node.self = nodes_.begin();
      node.parent = place.node_;
      node.siblings = place.children_;
      node.page = pages[i];
      node.place = found = place.children_->emplace(std::vector(key.begin(), key.end()), &node).first;
    }
    place.node_ = found->second;
    place.children_ = &place.node_->children;
    pages[i] = place.node_->page;
  }
}

void PrefixCache::touch(const Place& place) {
  for (Node* node = place.node_; node != nullptr; node = node->parent)
    nodes_.splice(nodes_.begin(), nodes_, node->self);
}

bool PrefixCache::evict() {
  const auto last = std::find_if(nodes_.rbegin(), nodes_.rend(), [](const Node& node) {
    return node.children.empty() && node.page.use_count() == 1;
  });
  if (last == nodes_.rend()) return false;
  last->siblings->erase(last->place);
  nodes_.erase(last->self);
  return true;
}

std::int64_t PrefixCache::idle_pages() const {
  return std::count_if(nodes_.begin(), nodes_.end(),
                       [](const Node& node) { return node.page.use_count() == 1; });
}

}  // namespace moba::llm
