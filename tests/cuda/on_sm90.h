#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <string>

#ifdef MOBA_CUDA_EMULATION
#include "emulation/block.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace moba::test {

/// Emulates a device of capability 9.0 during a test, which may force sm80 or sm90 kernels. On a real device
/// of another capability the test is skipped.
class OnSm90 : public testing::Test {
 protected:
  OnSm90() {
    const char* before = std::getenv(kChoice);
    if (before != nullptr) before_ = before;
    unsetenv(kChoice);
#ifdef MOBA_CUDA_EMULATION
    cuda::emulation::capability() = 90;
#endif
  }
  ~OnSm90() override {
#ifdef MOBA_CUDA_EMULATION
    cuda::emulation::capability() = 80;
#endif
    unsetenv(kChoice);
    if (before_) choose(before_->c_str());
  }
  void SetUp() override {
#ifndef MOBA_CUDA_EMULATION
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major != 9 || minor != 0) GTEST_SKIP() << "the device has another capability";
#endif
  }

  static void choose(const char* kernels) {
    setenv(kChoice, kernels, 1);
  }

 private:
  static constexpr const char* kChoice = "MOBA_CUDA_ARCH";
  std::optional<std::string> before_;
};

}  // namespace moba::test
