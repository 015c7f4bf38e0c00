// Arguments that the CUDA backend refuses before it launches a kernel.
#include <gtest/gtest.h>

#include <functional>

#include "device_case.h"

namespace moba::test {
namespace {

struct Call {
  Case c{.dtype = DType::bf16, .head_dim = 64, .sequences = one_sequence(5)};
  Tensor q{}, k{}, v{}, out{};
  std::vector<std::uint16_t> memory = std::vector<std::uint16_t>(5 * 64 + 8);

  Call() { refill(); }
  void refill() {
    fill(c);
    q = on_device(c.q.view());
    k = on_device(c.k.view());
    v = on_device(c.v.view());
    memory.resize(static_cast<std::size_t>(5 * c.head_dim) * 4 + 8);
    out = q;
    out.data = memory.data();
    out.strides = {c.head_dim, c.head_dim, 1};
  }
  void run() const { attention(q, k, v, c.sequences, c.routing, {.out = out}, {.backend = "cuda"}); }
};

TEST(CudaArguments, InvalidArgumentsThrow) {
  const std::vector<std::pair<const char*, std::function<void(Call&)>>> mistakes = {
      {"attention: q: expected bf16 or f16 (backend cuda), got f32",
       [](Call& call) {
         call.c.dtype = DType::f32;
         call.refill();
       }},
      {"attention: q: expected head_dim 64, 96, 128 or 256 (backend cuda), got 80",
       [](Call& call) {
         call.c.head_dim = 80;
         call.refill();
       }},
      {"attention: q: expected a CUDA tensor (backend cuda), got one on the CPU",
       [](Call& call) {
         for (Tensor* t : {&call.q, &call.k, &call.v, &call.out}) t->device = Device::cpu;
       }},
      {"attention: k: expected the device of q, got another one",
       [](Call& call) { call.k.device = Device::cpu; }},
      {"attention: v: expected rows aligned to 16 bytes, got an address 0 past that and "
       "strides of 68 and 64 elements",
       [](Call& call) {
         call.v.sizes[0] = call.k.sizes[0] = call.q.sizes[0] = call.out.sizes[0] = 4;
         call.c.sequences = one_sequence(4);
         call.v.strides[0] = 68;
       }},
      {"attention: out: expected rows aligned to 16 bytes, got an address 2 past that",
       [](Call& call) { call.out.data = call.memory.data() + 1; }},
  };
  for (const auto& [message, mistake] : mistakes) {
    Call call;
    mistake(call);
    try {
      call.run();
      FAIL() << "no error: " << message;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find(message), 0U) << error.what();
    }
  }
  EXPECT_NO_THROW(Call().run());
}

TEST(CudaArguments, CudaTensorsUseTheCudaBackendAndThrowOnOthers) {
  const Call call;
  EXPECT_NO_THROW(attention(call.q, call.k, call.v, call.c.sequences, call.c.routing, {.out = call.out}));
  for (const char* backend : {"cpu", "reference"}) {
    try {
      attention(call.q, call.k, call.v, call.c.sequences, call.c.routing, {.out = call.out},
                {.backend = backend});
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("expected CPU tensors"), std::string::npos) << error.what();
    }
  }
}

TEST(CudaArguments, DeviceSequencesThrowOnHostBackends) {
  const Call call;
  const DeviceSequences sequences{call.c.sequences.cu_seqlens_q.data(), call.c.sequences.cu_seqlens_k.data(),
                                  1, 5};
  EXPECT_THROW(
      attention(call.q, call.k, call.v, sequences, call.c.routing, {.out = call.out}, {.backend = "cpu"}),
      Error);
  for (const DeviceSequences& wrong :
       {DeviceSequences{nullptr, sequences.cu_seqlens_k, 1, 5},
        DeviceSequences{sequences.cu_seqlens_q, sequences.cu_seqlens_k, -1, 5},
        DeviceSequences{sequences.cu_seqlens_q, sequences.cu_seqlens_k, 1, -1}}) {
    EXPECT_THROW(attention(call.q, call.k, call.v, wrong, call.c.routing, {.out = call.out}), Error);
  }
}

}  // namespace
}  // namespace moba::test
