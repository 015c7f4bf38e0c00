// Arguments that the CUDA backend refuses before it launches a kernel.
#include <gtest/gtest.h>

#include <functional>

#include "cuda/flow.h"
#include "device_case.h"
#include "errors.h"
#include "mirror.h"

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

/// Returns the argument that a call refuses because it is host memory.
std::string host_argument(const std::function<void()>& call) {
  try {
    named("call", call);
  } catch (const Error& error) {
    std::string message = error.what();
    const std::string end = ": expected device memory, got a host pointer";
    if (message.ends_with(end)) return message.substr(6, message.size() - 6 - end.size());
    return message;
  }
  return "none";
}

/// The calls of the flow itself, which no Mirror serves. All memory but one argument's is the device's.
TEST(CudaArguments, HostMemoryThrows) {
  Case c{.dtype = DType::bf16, .head_dim = 64, .sequences = one_sequence(5)};
  c.routing = {.block_size = 2, .top_k = 2};
  fill(c);
  Mirror mirror;
  const auto placed = [&](Tensor t) { return mirror.read(on_device(t)); };
  Array other(DType::bf16, 5, 1, 64);
  const Tensor q = placed(c.q.view()), k = placed(c.k.view()), v = placed(c.v.view()),
               out = placed(other.view()), dq = placed(other.view()), dk = placed(other.view()),
               dv = placed(other.view()), host = on_device(other.view());
  std::vector<float> lse_on_host(5);
  std::vector<std::int32_t> selection_on_host{0, -1, 0, -1, 0, 1, 0, 1, 0, 2};
  float* const lse = mirror.read(lse_on_host.data(), 5);
  std::int32_t* const selection = mirror.read(selection_on_host.data(), 10);
  const DeviceBatch batch = batch_of(c.sequences);
  DeviceBatch offsets = batch;
  offsets.on_device = true;

  const auto forward = [&](const Tensor& of_q, const Tensor& of_k, const Tensor& of_v, const DeviceBatch& of,
                           const Outputs& outputs) {
    return host_argument([&] { cuda::attention(of_q, of_k, of_v, of, c.routing, outputs, {}); });
  };
  EXPECT_EQ(forward(q, k, v, batch, {.out = out, .lse = lse, .selection = selection}), "none");
  EXPECT_EQ(forward(host, k, v, batch, {.out = out}), "q");
  EXPECT_EQ(forward(q, host, v, batch, {.out = out}), "k");
  EXPECT_EQ(forward(q, k, host, batch, {.out = out}), "v");
  EXPECT_EQ(forward(q, k, v, batch, {.out = host}), "out");
  EXPECT_EQ(forward(q, k, v, batch, {.out = out, .lse = lse_on_host.data()}), "lse");
  EXPECT_EQ(forward(q, k, v, batch, {.out = out, .selection = selection_on_host.data()}), "selection");
  EXPECT_EQ(forward(q, k, v, offsets, {.out = out}), "cu_seqlens_q");
  offsets.q_starts = mirror.read(offsets.q_starts, 2);
  EXPECT_EQ(forward(q, k, v, offsets, {.out = out}), "cu_seqlens_k");

  const auto backward = [&](const Tensor& d_out, const Saved& saved, const Gradients& gradients) {
    return host_argument(
        [&] { cuda::attention_backward(d_out, q, k, v, saved, batch, c.routing, gradients, {}); });
  };
  const Saved saved{.out = out, .lse = lse, .selection = selection};
  EXPECT_EQ(backward(q, saved, {dq, dk, dv}), "none");
  EXPECT_EQ(backward(host, saved, {dq, dk, dv}), "d_out");
  EXPECT_EQ(backward(q, {host, lse, selection}, {dq, dk, dv}), "saved.out");
  EXPECT_EQ(backward(q, {out, lse_on_host.data(), selection}, {dq, dk, dv}), "saved.lse");
  EXPECT_EQ(backward(q, {out, lse, selection_on_host.data()}, {dq, dk, dv}), "saved.selection");
  EXPECT_EQ(backward(q, saved, {host, dk, dv}), "dq");
  EXPECT_EQ(backward(q, saved, {dq, host, dv}), "dk");
  EXPECT_EQ(backward(q, saved, {dq, dk, host}), "dv");
}

TEST(CudaArguments, HostMemoryOfACacheThrows) {
  Mirror mirror;
  const Array rows(DType::bf16, 6, 1, 64);
  const auto pages_of = [](Tensor t) {
    t.rank = 4;
    t.sizes = {6, 1, 1, 64};
    t.strides = {64, 64, 64, 1};
    return on_device(t);
  };
  const Tensor q = mirror.read(on_device(rows.slice(0, 2))), out = mirror.read(on_device(rows.slice(0, 2))),
               host = on_device(rows.slice(0, 2)), host_pages = pages_of(rows.view());
  const std::vector<std::int32_t> table_on_host{3, 1, 2, 0, 4, 5}, lengths_on_host{3, 2};
  const std::vector<float> lse_on_host(2);
  const auto pages = [&] { return mirror.read(host_pages); };
  const PagedCache cache{.k = pages(),
                         .v = pages(),
                         .means = pages(),
                         .page_table = mirror.read(table_on_host.data(), 6),
                         .table_stride = 3,
                         .lengths = mirror.read(lengths_on_host.data(), 2),
                         .starts = mirror.read(std::vector<std::int32_t>(2).data(), 2),
                         .sequences = 2,
                         .max_seqlen_k = 3};
  const Routing routing{.block_size = 1, .top_k = 2};
  const auto error = [&](const Tensor& of, const PagedCache& in, const Outputs& outputs) {
    return host_argument([&] { cuda::decode(of, in, routing, outputs, {}); });
  };
  const auto with = [&](auto PagedCache::*member, auto value) {
    PagedCache changed = cache;
    changed.*member = value;
    return error(q, changed, {.out = out});
  };
  EXPECT_EQ(error(q, cache, {.out = out}), "none");
  EXPECT_EQ(error(host, cache, {.out = out}), "q");
  EXPECT_EQ(error(q, cache, {.out = host}), "out");
  EXPECT_EQ(error(q, cache, {.out = out, .lse = const_cast<float*>(lse_on_host.data())}), "lse");
  EXPECT_EQ(with(&PagedCache::k, host_pages), "cache.k");
  EXPECT_EQ(with(&PagedCache::v, host_pages), "cache.v");
  EXPECT_EQ(with(&PagedCache::means, host_pages), "cache.means");
  EXPECT_EQ(with(&PagedCache::page_table, table_on_host.data()), "cache.page_table");
  EXPECT_EQ(with(&PagedCache::lengths, lengths_on_host.data()), "cache.lengths");
  EXPECT_EQ(with(&PagedCache::starts, lengths_on_host.data()), "cache.starts");
  EXPECT_EQ(host_argument([&] { cuda::update_means(cache, 1, lengths_on_host.data(), 3, {}); }), "before");
  EXPECT_EQ(host_argument([&] { cuda::update_means(cache, 1, nullptr, 3, {}); }), "none");
}

/// Lists without elements are the device's too where the caller has them.
TEST(CudaArguments, EmptyOutputsAreLegal) {
  Case c{.dtype = DType::bf16, .head_dim = 64, .sequences = {{0, 0}, {0, 5}}};
  fill(c);
  EXPECT_NO_THROW(run_on_device(c));
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
