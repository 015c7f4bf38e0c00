// Selection of the backend by argument, environment and device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "cases.h"
#include "moba/build_info.h"

namespace moba::test {
namespace {

/// Sets MOBA_BACKEND during a test.
class Forced {
 public:
  explicit Forced(const char* name) { setenv("MOBA_BACKEND", name, 1); }
  ~Forced() { unsetenv("MOBA_BACKEND"); }
};

/// Only the reference supports f64, so an f64 call shows which backend ran.
Case double_case() {
  Case c{.dtype = DType::f64, .sequences = one_sequence(5)};
  fill(c);
  return c;
}

TEST(BackendChoice, ReferenceAndCpuAreBuilt) {
  const std::vector<std::string> names = backends();
  for (const char* name : {"reference", "cpu"})
    EXPECT_NE(std::find(names.begin(), names.end(), name), names.end()) << name;
}

TEST(BackendChoice, CpuIsTheDefault) {
  EXPECT_EQ(backends().front(), "cpu");
  EXPECT_THROW(run_attention(double_case(), {}), Error);
}

TEST(BuildInfo, NamesVersionCompilerAndGpuArchitectures) {
  const BuildInfo build = build_info();
  EXPECT_THAT(build.version, testing::MatchesRegex("[0-9]+\\.[0-9]+\\.[0-9]+"));
  EXPECT_FALSE(build.compiler.empty());
  const std::vector<std::string> names = backends();
  const bool has_cuda = std::find(names.begin(), names.end(), "cuda") != names.end();
  EXPECT_EQ(build.cuda_architectures.empty(), !has_cuda);
}

TEST(BuildInfo, InstructionSetInUseIsOneOfThoseAvailable) {
  EXPECT_THAT(cpu_targets(), testing::Contains(cpu_target()));
}

TEST(BackendChoice, ArgumentSelectsTheBackend) {
  EXPECT_NO_THROW(run_attention(double_case(), {.backend = "reference"}));
}

TEST(BackendChoice, EnvironmentSelectsTheBackend) {
  const Forced forced("reference");
  EXPECT_NO_THROW(run_attention(double_case(), {}));
}

TEST(BackendChoice, ArgumentOverridesTheEnvironment) {
  const Forced forced("reference");
  EXPECT_THROW(run_attention(double_case(), {.backend = "cpu"}), Error);
}

TEST(BackendChoice, UnknownBackendThrows) {
  const Forced forced("quantum");
  try {
    run_attention(double_case(), {});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find("attention: MOBA_BACKEND: expected one of this build ("), 0U)
        << error.what();
  }
}

TEST(BackendChoice, UnsupportedHeadDimThrows) {
  Case c{.head_dim = 300, .sequences = one_sequence(5)};
  fill(c);
  try {
    run_attention(c, {.backend = "cpu"});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("expected q of head_dim up to 256, got 300"), std::string::npos)
        << error.what();
  }
  EXPECT_NO_THROW(run_attention(c, {.backend = "reference"}));
}

}  // namespace
}  // namespace moba::test
