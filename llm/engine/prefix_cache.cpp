#include "llm/engine/prefix_cache.h"

#include <algorithm>
#include <iterator>

namespace moba::llm {

bool PrefixCache::Less::operator()(std::span<const std::int32_t> a, std::span<const std::int32_t> b) const {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

PrefixCache::Children& PrefixCache::roots(std::string_view variant) {
  const auto found = roots_.find(variant);
  return found != roots_.end() ? found->second : roots_[std::string(variant)];
}

std::span<const std::int32_t> PrefixCache::page_of(std::span<const std::int32_t> tokens,
                                                   std::size_t index) const {
  const auto size = static_cast<std::size_t>(page_tokens_);
  return tokens.subspan(index * size, size);
}

void PrefixCache::touch(std::span<Node* const> path) {
  for (auto node = path.rbegin(); node != path.rend(); ++node)
    nodes_.splice(nodes_.begin(), nodes_, (*node)->self);
}

std::vector<Page> PrefixCache::match(std::string_view variant, std::span<const std::int32_t> tokens) {
  std::vector<Page> pages;
  std::vector<Node*> path;
  const Children* children = &roots(variant);
  const std::size_t count = tokens.size() / static_cast<std::size_t>(page_tokens_);
  while (path.size() < count) {
    const auto next = children->find(page_of(tokens, path.size()));
    if (next == children->end()) break;
    path.push_back(next->second);
    pages.push_back(next->second->page);
    children = &next->second->children;
  }
  touch(path);
  return pages;
}

void PrefixCache::insert(std::string_view variant, std::span<const std::int32_t> tokens,
                         std::span<Page> pages) {
  std::vector<Node*> path;
  Children* children = &roots(variant);
  for (Page& page : pages) {
    const std::span<const std::int32_t> key = page_of(tokens, path.size());
    auto place = children->find(key);
    if (place == children->end()) {
      Node& node = nodes_.emplace_front();
      node.self = nodes_.begin();
      node.siblings = children;
      node.page = page;
      node.place = place = children->emplace(std::vector(key.begin(), key.end()), &node).first;
    }
    Node* node = place->second;
    page = node->page;
    path.push_back(node);
    children = &node->children;
  }
  touch(path);
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
