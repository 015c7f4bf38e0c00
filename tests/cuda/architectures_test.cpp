// Devices that a build of the CUDA kernels supports.
#include "cuda/architectures.h"

#include <gtest/gtest.h>

#include "device_case.h"
#include "emulation/block.h"

namespace moba::test {
namespace {

TEST(CudaArchitectures, MachineCodeRunsOnLaterMinorVersions) {
  for (const int capability : {80, 86, 89}) EXPECT_TRUE(cuda::runs_on("80-real", capability));
  for (const int capability : {75, 90, 100, 120}) EXPECT_FALSE(cuda::runs_on("80-real", capability));
  EXPECT_FALSE(cuda::runs_on("86-real", 80));
  EXPECT_TRUE(cuda::runs_on("100f-real", 103));
  EXPECT_FALSE(cuda::runs_on("100f-real", 120));
}

TEST(CudaArchitectures, ArchitectureSpecificCodeRunsOnOneDevice) {
  EXPECT_TRUE(cuda::runs_on("90a-real", 90));
  for (const int capability : {80, 100, 103}) EXPECT_FALSE(cuda::runs_on("90a-real", capability));
  EXPECT_FALSE(cuda::runs_on("100a", 103));
}

TEST(CudaArchitectures, PtxRunsOnLaterDevices) {
  for (const char* const architecture : {"90-virtual", "90"}) {
    for (const int capability : {90, 100, 103, 120}) EXPECT_TRUE(cuda::runs_on(architecture, capability));
    EXPECT_FALSE(cuda::runs_on(architecture, 89));
  }
  EXPECT_TRUE(cuda::runs_on("native", 75));
}

TEST(CudaArchitectures, DefaultBuildSupportsDevicesFromSm80On) {
  for (const int capability : {80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
    EXPECT_TRUE(cuda::any_runs_on(cuda::built_architectures(), capability));
  EXPECT_FALSE(cuda::any_runs_on(cuda::built_architectures(), 75));
}

TEST(CudaArchitectures, DeviceOfAnotherArchitectureThrows) {
  Case c{.dtype = DType::bf16, .head_dim = 64, .sequences = one_sequence(5)};
  fill(c);
  cuda::emulation::capability() = 75;
  try {
    run_on_device(c);
    ADD_FAILURE() << "expected an error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "attention: backend: expected a device that the kernels of cuda are compiled for "
                 "(80-real,90a-real,90-virtual), got compute capability 7.5");
  }
  cuda::emulation::capability() = 80;
}

}  // namespace
}  // namespace moba::test
