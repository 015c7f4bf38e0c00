#include "llm/engine/prefix_cache.h"

#include <gtest/gtest.h>

#include <numeric>

namespace moba::llm {
namespace {

constexpr std::int64_t kPage = 4;

std::vector<std::int32_t> tokens(std::int32_t first, std::int64_t count) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  std::iota(ids.begin(), ids.end(), first);
  return ids;
}

class PrefixCacheTest : public ::testing::Test {
 protected:
  /// Caches pages for `ids`; returns them.
  std::vector<Page> insert(const std::vector<std::int32_t>& ids, std::string_view variant = "full") {
    std::vector<Page> pages;
    for (std::size_t i = 0; i < ids.size() / kPage; ++i) pages.push_back(pool_.allocate());
    PrefixCache::Place place = cache_.root(variant);
    cache_.insert(place, ids, pages);
    return pages;
  }
  /// Returns the cached pages of a prompt that uses them now.
  std::vector<Page> match(const std::vector<std::int32_t>& ids, std::string_view variant = "full") {
    PrefixCache::Place place = cache_.root(variant);
    std::vector<Page> pages = cache_.match(place, ids);
    cache_.touch(place);
    return pages;
  }
  std::size_t matched(const std::vector<std::int32_t>& ids, std::string_view variant = "full") {
    return match(ids, variant).size();
  }

  PagePool pool_{64, 10};
  PrefixCache cache_{kPage};
};

TEST_F(PrefixCacheTest, MatchesWholePagesOfTheSameTokensAndVariant) {
  const std::vector<Page> pages = insert(tokens(0, 12));
  EXPECT_EQ(match(tokens(0, 12)), pages);
  EXPECT_EQ(matched(tokens(0, 11)), 2U);
  EXPECT_EQ(matched(tokens(0, 100)), 3U);
  EXPECT_EQ(matched(tokens(1, 12)), 0U);
  EXPECT_EQ(matched(tokens(0, 12), "moba"), 0U);
  std::vector<std::int32_t> other = tokens(0, 12);
  other[5] = 99;
  EXPECT_EQ(matched(other), 1U);
  EXPECT_EQ(matched({}), 0U);
}

TEST_F(PrefixCacheTest, EqualPagesAreCachedOnce) {
  const std::vector<Page> first = insert(tokens(0, 8));
  std::vector<std::int32_t> longer = tokens(0, 12);
  const std::vector<Page> second = insert(longer);
  EXPECT_EQ(second[0], first[0]);
  EXPECT_EQ(second[1], first[1]);
  EXPECT_EQ(cache_.pages(), 3);
  EXPECT_EQ(pool_.used(), 3);
}

TEST_F(PrefixCacheTest, EvictsTheLeastRecentlyUsedEndOfAPrefix) {
  insert(tokens(0, 12));
  insert(tokens(100, 8));
  EXPECT_EQ(matched(tokens(0, 12)), 3U);  // now the more recent
  EXPECT_TRUE(cache_.evict());
  EXPECT_EQ(matched(tokens(100, 8)), 1U);
  EXPECT_TRUE(cache_.evict());
  EXPECT_EQ(matched(tokens(0, 12)), 2U);
  EXPECT_EQ(pool_.used(), 3);
}

TEST_F(PrefixCacheTest, PlaceContinuesWhereItIs) {
  const std::vector<std::int32_t> ids = tokens(0, 12);
  const std::vector<Page> pages = insert(ids);
  PrefixCache::Place place = cache_.root("full");
  EXPECT_EQ(cache_.match(place, std::span(ids).first(4)), std::vector<Page>({pages[0]}));
  EXPECT_EQ(cache_.match(place, std::span(ids).subspan(4)), std::vector<Page>({pages[1], pages[2]}));
  EXPECT_TRUE(cache_.match(place, tokens(50, 4)).empty());
  std::vector<Page> more = {pool_.allocate()};
  cache_.insert(place, tokens(50, 4), more);
  std::vector<std::int32_t> longer = ids;
  for (const std::int32_t id : tokens(50, 4)) longer.push_back(id);
  EXPECT_EQ(matched(longer), 4U);
}

TEST_F(PrefixCacheTest, PagesInUseAreNotEvicted) {
  std::vector<Page> held = insert(tokens(0, 8));
  EXPECT_EQ(cache_.idle_pages(), 0);
  EXPECT_FALSE(cache_.evict());
  held.pop_back();
  EXPECT_EQ(cache_.idle_pages(), 1);
  EXPECT_TRUE(cache_.evict());
  EXPECT_FALSE(cache_.evict());
  EXPECT_EQ(matched(tokens(0, 8)), 1U);
}

TEST_F(PrefixCacheTest, VeryLongPrefixesAreFreedWithoutRecursion) {
  PagePool pool(64, 200000);
  PrefixCache cache(1);
  const std::vector<std::int32_t> ids = tokens(0, 200000);
  std::vector<Page> pages;
  for (std::size_t i = 0; i < ids.size(); ++i) pages.push_back(pool.allocate());
  PrefixCache::Place place = cache.root("full");
  cache.insert(place, ids, pages);
  EXPECT_EQ(cache.pages(), 200000);
}

TEST(PagePool, StopsAtItsLimitAndTakesPagesBack) {
  PagePool pool(128, 2);
  Page a = pool.allocate(), b = pool.allocate();
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(pool.allocate());
  a.reset();
  EXPECT_EQ(pool.used(), 1);
  EXPECT_TRUE(pool.allocate());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.get()) % 64, 0U);
}

TEST(PagePool, PagesOutliveIt) {
  Page page;
  {
    PagePool pool(128, 2);
    page = pool.allocate();
  }
  *page = std::byte{1};
}

}  // namespace
}  // namespace moba::llm
