#pragma once

#include <gtest/gtest.h>

#include <string>

#include "moba/attention.h"

namespace moba::test {

/// Runs a test once for every backend of this build.
class EveryBackend : public testing::TestWithParam<std::string> {
 protected:
  Execution execution() const { return {.backend = GetParam(), .parallel = serial()}; }
  bool exact() const { return GetParam() == "reference"; }
};

#define MOBA_FOR_EVERY_BACKEND(suite)                                       \
  INSTANTIATE_TEST_SUITE_P(All, suite, testing::ValuesIn(moba::backends()), \
                           [](const auto& instance) { return std::string(instance.param); })

}  // namespace moba::test
