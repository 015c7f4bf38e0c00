// Whole forward calls on the emulated device against the oracle.
#include <gtest/gtest.h>

#include "device_case.h"
#include "oracle.h"

namespace moba::test {
namespace {

class CudaAgreement : public testing::TestWithParam<std::uint64_t> {};

/// Swaps of blocks whose scores rounding cannot tell apart are counted, and must stay rare.
TEST_P(CudaAgreement, WithTheOracleOnRandomCases) {
  constexpr std::uint64_t kCases = 25;
  std::int64_t swaps = 0, listed = 0;
  for (std::uint64_t i = 0; i < kCases && !HasFailure(); ++i) {
    const Case c = random_device_case(GetParam() * kCases + i);
    const Result result = run_on_device(c);
    swaps += check_result(c, result, Rounding::partial);
    listed += static_cast<std::int64_t>(result.selection.size());
  }
  RecordProperty("swaps", std::to_string(swaps));
  EXPECT_LE(swaps, listed / 1000);
}

INSTANTIATE_TEST_SUITE_P(All, CudaAgreement, testing::Range<std::uint64_t>(0, 4));

}  // namespace
}  // namespace moba::test
