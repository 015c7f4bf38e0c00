#include "llm/model/arithmetic.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

namespace {

using moba::DType;
using moba::llm::best_arithmetic;

TEST(BestArithmetic, IsFloat32WithoutBf16Units) {
  setenv("MOBA_CPU_BF16", "none", 1);
  EXPECT_EQ(best_arithmetic().dtype, DType::f32);
  EXPECT_TRUE(best_arithmetic().int8_decode);
  unsetenv("MOBA_CPU_BF16");
}

TEST(BestArithmetic, IsBf16WithAmx) {
  std::ifstream file("/proc/cpuinfo");
  const std::string cpu{std::istreambuf_iterator<char>(file), {}};
  if (cpu.find("amx_bf16") == std::string::npos) GTEST_SKIP() << "the CPU has no AMX";
  setenv("MOBA_CPU_BF16", "amx", 1);
  EXPECT_EQ(best_arithmetic().dtype, DType::bf16);
  unsetenv("MOBA_CPU_BF16");
}

}  // namespace
