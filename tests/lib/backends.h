#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "moba/attention.h"

namespace moba::test {

/// Returns the backends of this build that work on host memory.
inline std::vector<std::string> host_backends() {
  std::vector<std::string> names = backends();
  std::erase(names, "cuda");
  return names;
}

/// Test that MOBA_FOR_EVERY_BACKEND runs once per backend.
class EveryBackend : public testing::TestWithParam<std::string> {
 protected:
  Execution execution() const { return {.backend = GetParam(), .parallel = serial()}; }
  bool exact() const { return GetParam() == "reference"; }
};

#define MOBA_FOR_EVERY_BACKEND(suite)                                                  \
  INSTANTIATE_TEST_SUITE_P(All, suite, testing::ValuesIn(moba::test::host_backends()), \
                           [](const auto& instance) { return std::string(instance.param); })

}  // namespace moba::test
