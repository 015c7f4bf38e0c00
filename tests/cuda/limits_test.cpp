// Whole calls on tensors with offsets as large as those of 10 million tokens of 64 heads of 256, and on a
// device whose launches fail.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <random>

#include "cuda/flow.h"
#include "cuda/stages.h"
#include "emulation/block.h"
#include "emulation/memory.h"
#include "mirror.h"

namespace moba::cuda {
namespace {

constexpr std::int64_t kTokens = 10'000'000, kHeads = 64, kMaxElements = kTokens * kHeads * 256;

enum class Spread { compact, far };

/// A bf16 tensor [.., D] in reserved address space of the device, of which only written pages take memory.
class Field {
 public:
  Field(std::initializer_list<std::int64_t> sizes, Spread spread) {
    tensor_ = {.dtype = DType::bf16, .device = Device::cuda, .rank = static_cast<int>(sizes.size())};
    std::copy(sizes.begin(), sizes.end(), tensor_.sizes.begin());
    const auto last = sizes.size() - 1;
    tensor_.strides[last] = 1;
    if (spread == Spread::compact) {
      for (std::size_t dim = last; dim-- > 0;)
        tensor_.strides[dim] = tensor_.strides[dim + 1] * tensor_.sizes[dim + 1];
    } else {
      constexpr std::int64_t kVectorElements = 8;
      tensor_.strides[0] = (kMaxElements / (tensor_.sizes[0] - 1) / kVectorElements + 1) * kVectorElements;
      for (std::size_t dim = 1; dim < last; ++dim)
        tensor_.strides[dim] =
            tensor_.strides[dim - 1] / tensor_.sizes[dim] / kVectorElements * kVectorElements;
    }
    std::int64_t elements = 1;
    for (std::size_t dim = 0; dim <= last; ++dim) elements += (tensor_.sizes[dim] - 1) * tensor_.strides[dim];
    bytes_ = static_cast<std::size_t>(elements) * sizeof(std::uint16_t);
    tensor_.data =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (tensor_.data == MAP_FAILED) throw std::runtime_error("no address space for a test");
    range_.emplace(tensor_.data, bytes_);
  }
  Field(std::initializer_list<std::int64_t> sizes, Spread spread, std::uint64_t seed) : Field(sizes, spread) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for_rows([&](std::uint16_t* row) {
      for (std::int64_t d = 0; d < head_dim(); ++d) {
        const float value = normal(random);
        std::uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof bits);
        row[d] = static_cast<std::uint16_t>(bits >> 16);
      }
    });
  }
  ~Field() {
    range_.reset();
    munmap(tensor_.data, bytes_);
  }
  Field(const Field&) = delete;
  Field& operator=(const Field&) = delete;

  const Tensor& view() const { return tensor_; }
  std::vector<std::uint16_t> values() const {
    std::vector<std::uint16_t> values;
    for_rows([&](const std::uint16_t* row) { values.insert(values.end(), row, row + head_dim()); });
    return values;
  }

 private:
  std::int64_t head_dim() const { return tensor_.sizes[static_cast<std::size_t>(tensor_.rank) - 1]; }

  void for_rows(const std::function<void(std::uint16_t*)>& visit, std::size_t dim = 0,
                std::int64_t offset = 0) const {
    if (dim + 1 == static_cast<std::size_t>(tensor_.rank))
      return visit(static_cast<std::uint16_t*>(tensor_.data) + offset);
    for (std::int64_t i = 0; i < tensor_.sizes[dim]; ++i)
      for_rows(visit, dim + 1, offset + i * tensor_.strides[dim]);
  }

  Tensor tensor_{};
  std::size_t bytes_ = 0;
  std::optional<emulation::DeviceRange> range_{};
};

/// All outputs of the calls.
using Written = std::vector<std::vector<std::uint16_t>>;

/// Runs two sequences forward and backward.
Written attend(const Routing& routing, Spread spread, const Execution& execution = {}) {
  const Sequences sequences{{0, 10, 40}, {0, 20, 61}};
  constexpr std::int64_t kQ = 40, kK = 61, kDim = 64;
  const Field q({kQ, 4, kDim}, spread, 1), k({kK, 2, kDim}, spread, 2), v({kK, 2, kDim}, spread, 3),
      d_out({kQ, 4, kDim}, spread, 4), out({kQ, 4, kDim}, spread), dq({kQ, 4, kDim}, spread),
      dk({kK, 2, kDim}, spread), dv({kK, 2, kDim}, spread);
  std::vector<float> rows(static_cast<std::size_t>(kQ) * 4);
  test::Mirror mirror;
  float* const lse = mirror.read(rows.data(), kQ * 4);
  named("attention", [&] {
    attention(q.view(), k.view(), v.view(), batch_of(sequences), routing, {.out = out.view(), .lse = lse},
              execution);
    attention_backward(d_out.view(), q.view(), k.view(), v.view(), {.out = out.view(), .lse = lse},
                       batch_of(sequences), routing, {dq.view(), dk.view(), dv.view()}, execution);
  });
  return {out.values(), dq.values(), dk.values(), dv.values()};
}

/// Decodes three sequences in pages.
Written decode_pages(const Routing& routing, Spread spread, const Execution& execution = {}) {
  constexpr std::int64_t kPages = 12, kPageTokens = 8, kDim = 64;
  const Field q({3, 4, kDim}, spread, 5), k({kPages, kPageTokens, 2, kDim}, spread, 6),
      v({kPages, kPageTokens, 2, kDim}, spread, 7), means({kPages, 1, 2, kDim}, spread),
      out({3, 4, kDim}, spread);
  const std::vector<std::int32_t> table{11, 0, 5, 2, 7, 1, 9, 3, 10, 4, 8, 6}, lengths{30, 9, 25},
      starts{0, 2, 5};
  test::Mirror mirror;
  const PagedCache cache{.k = k.view(),
                         .v = v.view(),
                         .means = means.view(),
                         .page_table = mirror.read(table.data(), kPages),
                         .table_stride = 4,
                         .lengths = mirror.read(lengths.data(), 3),
                         .starts = mirror.read(starts.data(), 3),
                         .sequences = 3,
                         .max_seqlen_k = 30};
  named("decode", [&] {
    cuda::update_means(cache, routing.block_size, nullptr, 30, execution);
    cuda::decode(q.view(), cache, routing, {.out = out.view()}, execution);
  });
  return {means.values(), out.values()};
}

TEST(CudaLimits, AttentionReachesOffsetsBeyond32Bits) {
  for (const Routing& routing : {Routing{.block_size = 16, .top_k = 3, .sink_blocks = 1}, Routing::full()})
    EXPECT_EQ(attend(routing, Spread::far), attend(routing, Spread::compact));
}

TEST(CudaLimits, Sm90AttentionReachesOffsetsBeyond32Bits) {
  const Routing routing{.block_size = 16, .top_k = 3};
  emulation::capability() = 90;
  setenv("MOBA_CUDA_ARCH", "sm90", 1);
  EXPECT_EQ(attend(routing, Spread::far), attend(routing, Spread::compact));
  unsetenv("MOBA_CUDA_ARCH");
  emulation::capability() = 80;
}

TEST(CudaLimits, DecodeReachesOffsetsBeyond32Bits) {
  for (const Routing& routing : {Routing{.block_size = 8, .top_k = 2}, Routing::full()})
    EXPECT_EQ(decode_pages(routing, Spread::far), decode_pages(routing, Spread::compact));
}

/// Returns a call on 10 million tokens that have addresses of the device, but no memory.
DeviceCall large_task(std::int64_t kv_heads, const Routing& routing) {
  Tensor q{.dtype = DType::bf16, .device = Device::cuda, .rank = 3};
  q.data = reinterpret_cast<void*>(std::uintptr_t{1} << 20);
  static const emulation::DeviceRange range(q.data, sizeof(std::uint16_t) * kMaxElements);
  q.sizes = {kTokens, kHeads, 256};
  q.strides = {kHeads * 256, 256, 1};
  Tensor k = q;
  k.sizes[1] = kv_heads;
  k.strides[0] = kv_heads * 256;
  return make_call(q, k, k, {.count = 1, .max_seqlen_k = kTokens}, routing);
}

/// The slices cover all heads and tokens, and the numbers that each counts in 32 bits fit them.
TEST(CudaLimits, LargeCallsAreSplitTo32BitEntries) {
  for (const std::int64_t kv_heads : {1, 8, 64}) {
    for (const Routing& routing :
         {Routing{.block_size = 128, .top_k = 8}, Routing{.block_size = 512, .top_k = 3},
          Routing{.block_size = 4096, .top_k = 12}, Routing::full()}) {
      const DeviceCall call = large_task(kv_heads, routing);
      const auto bytes = [&](const WorkSlice& slice) {
        return static_cast<std::size_t>(slice.heads() * call.rows(slice) * call.ranks()) * 512;
      };
      for (const std::size_t budget : {std::size_t{1} << 30, std::size_t{1} << 44}) {
        std::int64_t pairs = 0;
        for (const WorkSlice& slice : slices_of(call, {.workspace_bytes = budget}, bytes)) {
          EXPECT_LE(call.rows(slice) * call.ranks(), 0x7FFFFFFF);
          EXPECT_LE(call.max_tiles(slice), 0x7FFFFFFF);
          EXPECT_LE(bytes(slice), budget);
          pairs += slice.heads() * slice.tokens();
        }
        EXPECT_EQ(pairs, kv_heads * kTokens);
      }
    }
  }
}

/// A slice that cannot be split is refused: the gradient lists all rows of a kv head at once.
TEST(CudaLimits, TooManySelectedBlocksThrow) {
  const DeviceCall call = large_task(1, {.block_size = 128, .top_k = 8});
  const DeviceBatch batch{.count = 1, .max_seqlen_k = kTokens};
  try {
    named("attention_backward", [&] {
      attention_backward(call.q, call.q, call.k, call.v, {.out = call.q}, batch, call.routing,
                         {call.q, call.k, call.v}, {});
    });
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(
        std::string(error.what()),
        "attention_backward: q: expected fewer than 2^31 selected blocks in the rows of a kv head (backend "
        "cuda), got 10000000 tokens of 64 query heads with top_k 8");
  }
}

void no_kernel(const int) {}

TEST(CudaLimits, TooLargeGridThrows) {
  const Execution execution;
  Stream stream(execution);
  EXPECT_NO_THROW(stream.launch("none", no_kernel, {0, 1}, 32, 0, 0));
  for (const Grid grid : {Grid{std::int64_t{1} << 31, 1}, Grid{1, 65536}})
    EXPECT_THROW(stream.launch("none", no_kernel, grid, 32, 0, 0), DeviceFailure);
}

/// Each launch fails in turn: its call throws and releases its memory, and the next call is correct.
TEST(CudaLimits, FailedLaunchThrowsOnce) {
  const Routing routing{.block_size = 8, .top_k = 3};
  std::size_t held = 0;
  const Execution counted{.scratch = {[&](std::size_t bytes) {
                                        held += bytes;
                                        return emulation::allocate(bytes);
                                      },
                                      [&](void* memory, std::size_t bytes) {
                                        held -= bytes;
                                        emulation::release(memory);
                                      }}};
  for (const auto& call : {attend, decode_pages}) {
    const Written expected = call(routing, Spread::compact, {});
    int failures = 0;
    for (bool fails = true; fails; failures += fails ? 1 : 0) {
      emulation::launches_before_failure() = failures;
      try {
        EXPECT_EQ(call(routing, Spread::compact, counted), expected);
        fails = false;
      } catch (const DeviceError& error) {
        EXPECT_NE(std::string(error.what()).find(" cannot be launched"), std::string::npos) << error.what();
      }
      emulation::launches_before_failure() = -1;
      EXPECT_EQ(held, 0U);
    }
    EXPECT_GE(failures, 4);
    EXPECT_EQ(call(routing, Spread::compact, counted), expected);
  }
}

}  // namespace
}  // namespace moba::cuda
