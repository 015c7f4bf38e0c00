#include "llm/model/elementwise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <utility>

#include "moba/attention.h"

namespace moba::llm {
namespace {

constexpr std::int64_t kRows = 3;
/// Widths with and without a part of a vector at the end.
constexpr std::int64_t kWidths[] = {1, 7, 16, 67, 1536};

class Elementwise : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cpu_target().empty()) GTEST_SKIP() << "this machine lacks the instruction set of MOBA_CPU_TARGET";
  }
};

/// Compares with silu in double, which is rounded to the dtype of the activations.
void check_swiglu(at::ScalarType dtype, std::int64_t width, double tolerance) {
  const at::Tensor gate_up = at::randn({kRows, 2 * width}, at::kFloat).mul_(5).to(dtype);
  const at::Tensor before = gate_up.to(at::kDouble);
  swiglu(gate_up);
  const at::Tensor after = gate_up.to(at::kDouble);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t i = 0; i < width; ++i) {
      const auto gate = before[row][i].item<double>(), up = before[row][width + i].item<double>();
      const double expected = gate / (1 + std::exp(-gate)) * up;
      EXPECT_NEAR(after[row][i].item<double>(), expected, tolerance * std::fabs(expected) + 1e-30)
          << "gate " << gate << ", up " << up;
      EXPECT_EQ(after[row][width + i].item<double>(), up);
    }
  }
}

TEST_F(Elementwise, SwigluIsSiluTimesUp) {
  for (const std::int64_t width : kWidths) {
    SCOPED_TRACE(width);
    check_swiglu(at::kFloat, width, 4e-6);
    check_swiglu(at::kBFloat16, width, 0x1p-8);
  }
}

TEST_F(Elementwise, SwigluOfExtremes) {
  constexpr float kInf = std::numeric_limits<float>::infinity(),
                  kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr std::pair<float, float> kExpected[] = {{0, 0},         {-0.0F, 0},  {200, 200},   {-200, 0},
                                                   {3e38F, 3e38F}, {-3e38F, 0}, {kInf, kInf}, {kNan, kNan}};
  for (const auto& [gate, expected] : kExpected) {
    const at::Tensor gate_up = at::empty({1, 2 * 17}, at::kFloat).fill_(1);
    gate_up.narrow(1, 0, 17).fill_(gate);
    swiglu(gate_up);
    for (const std::int64_t i : {0, 16}) {  // of a whole vector, and alone
      const auto value = gate_up[0][i].item<float>();
      EXPECT_TRUE(value == expected || (std::isnan(value) && std::isnan(expected)))
          << value << " for a gate of " << gate;
    }
  }
}

TEST_F(Elementwise, AddAndRmsNormIsASumThenANorm) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const std::int64_t width : kWidths) {
      const at::Tensor x = at::randn({kRows, width}), y = at::randn({kRows, width}).to(dtype);
      const at::Tensor weight = at::randn({width}), sum = x.add(y.to(at::kFloat));
      const at::Tensor expected = at::empty({kRows, width}, dtype), out = at::empty({kRows, width}, dtype);
      rms_norm(sum, weight, 1e-5, expected);
      add_and_rms_norm(x, y, weight, 1e-5, out);
      EXPECT_TRUE(x.equal(sum)) << width;
      EXPECT_TRUE(out.equal(expected)) << width;
    }
  }
}

}  // namespace
}  // namespace moba::llm
