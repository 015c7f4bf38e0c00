#include "app/serve/api_keys.h"

#include <gtest/gtest.h>

namespace moba::app {
namespace {

TEST(ApiKeys, WithoutKeysEverythingIsAccepted) {
  const ApiKeys none;
  EXPECT_FALSE(none.required());
  EXPECT_TRUE(none.accepts(""));
}

TEST(ApiKeys, OnlyWholeKeysAreAccepted) {
  const ApiKeys keys({"alpha", "beta"});
  EXPECT_TRUE(keys.accepts("Bearer alpha"));
  EXPECT_TRUE(keys.accepts("Bearer beta"));
  for (const char* wrong : {"", "Bearer", "Bearer ", "alpha", "bearer alpha", "Bearer alph", "Bearer alphaa",
                            "Bearer alphaalpha", "Bearer Alpha", "Bearer gamma"})
    EXPECT_FALSE(keys.accepts(wrong)) << wrong;
}

}  // namespace
}  // namespace moba::app
