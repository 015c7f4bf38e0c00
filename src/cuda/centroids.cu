// Block means, and extremes where they are wanted, in one pass over the keys: one thread block per block and
// head, larger where blocks are large and few.
#include <type_traits>

#include "cuda/ptx/barrier.h"
#include "cuda/ptx/convert.h"
#include "cuda/ptx/copy.h"
#include "cuda/stages.h"

namespace moba::cuda {
namespace {

constexpr int kThreads = 128, kManyThreads = 1024;
/// Keys of a block from which on kManyThreads share it.
constexpr std::int64_t kLargeBlock = 2048;
/// Elements per thread: 16 bytes.
constexpr int kElements = 8;

template <typename T>
struct CentroidsParams {
  View<const T> k;
  View<T> mean{}, max{},
      min{};  // a packed block where tokens are, heads from head0 on; without data: not written
  Batch batch;
  std::int64_t block_size = 1, head0 = 0;
};

/// NaN stays.
MOBA_DEVICE float larger(float a, float b) {
  return b > a || b != b ? b : a;
}
MOBA_DEVICE float smaller(float a, float b) {
  return b < a || b != b ? b : a;
}

/// Sums, or extremes, of the rows of keys that a thread reads.
template <typename T, bool has_extremes>
struct Features {
  float sum[kElements] = {}, max[kElements], min[kElements];

  MOBA_DEVICE Features() {
    MOBA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      max[i] = -ptx::infinity();
      min[i] = ptx::infinity();
    }
  }
  MOBA_DEVICE void add(const ptx::Vec16& v) {
    const std::uint32_t pairs[] = {v.x, v.y, v.z, v.w};
    MOBA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const float value = i % 2 == 0 ? ptx::unpack_low<T>(pairs[i / 2]) : ptx::unpack_high<T>(pairs[i / 2]);
      sum[i] += value;
      if constexpr (has_extremes) {
        max[i] = larger(max[i], value);
        min[i] = smaller(min[i], value);
      }
    }
  }
};

template <typename T, int head_dim, int threads, bool has_extremes>
MOBA_KERNEL(threads, 1024 / threads)
centroids_kernel(MOBA_GRID_CONSTANT CentroidsParams<T> p) {
  constexpr int kColumns = head_dim / kElements, kRows = threads / kColumns;
  constexpr int kUnroll = 8;
  const auto packed = static_cast<std::int32_t>(ptx::block_x());
  const std::int64_t head = ptx::block_y();
  const std::int32_t* starts = p.batch.block_starts;
  if (packed >= starts[p.batch.sequences]) return;
  const std::int32_t sequence = sequence_of(starts, p.batch.sequences, packed);
  const std::int32_t first_key = p.batch.k_starts[sequence];
  const KeyRange keys =
      keys_of(packed - starts[sequence], p.block_size, p.batch.k_starts[sequence + 1] - first_key);

  const int column = ptx::thread() % kColumns, row = ptx::thread() / kColumns;
  Features<T, has_extremes> features;
  if (row < kRows) {
    const T* from = p.k.row(first_key, p.head0 + head) + column * kElements;
    std::int32_t key = keys.begin + row;
    for (; key + (kUnroll - 1) * kRows < keys.end; key += kUnroll * kRows) {
      ptx::Vec16 loaded[kUnroll];
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i)
        loaded[i] = ptx::load_streaming(from + (key + i * kRows) * p.k.token_stride);
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i) features.add(loaded[i]);
    }
    for (; key < keys.end; key += kRows) features.add(ptx::load_streaming(from + key * p.k.token_stride));
  }

  // The values of the threads are combined in the order of their rows.
  auto* of_rows = reinterpret_cast<float*>(ptx::shared());  // [kRows, D]
  const auto combine = [&](const float(&values)[kElements], float first, const View<T>& to, auto&& fold,
                           float count) {
    if (row < kRows) {
      MOBA_UNROLL
      for (int i = 0; i < kElements; ++i) of_rows[row * head_dim + column * kElements + i] = values[i];
    }
    ptx::syncthreads();
    auto* const pairs = reinterpret_cast<std::uint32_t*>(to.row(packed, head));
    for (int pair = ptx::thread(); pair < head_dim / 2; pair += threads) {
      float low = first, high = first;
      MOBA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        low = fold(low, of_rows[r * head_dim + 2 * pair]);
        high = fold(high, of_rows[r * head_dim + 2 * pair + 1]);
      }
      pairs[pair] = ptx::pack<T>(low / count, high / count);
    }
    ptx::syncthreads();
  };
  if (!has_extremes || p.mean.data != nullptr)
    combine(
        features.sum, 0, p.mean, [](float a, float b) { return a + b; },
        static_cast<float>(keys.end - keys.begin));
  if constexpr (has_extremes) {
    if (p.max.data != nullptr)
      combine(
          features.max, -ptx::infinity(), p.max, [](float a, float b) { return larger(a, b); }, 1);
    if (p.min.data != nullptr)
      combine(
          features.min, ptx::infinity(), p.min, [](float a, float b) { return smaller(a, b); }, 1);
  }
}

template <typename T, int head_dim, bool has_extremes>
void launch_centroids(Stream& stream, const DeviceCall& call, std::int64_t heads,
                      const CentroidsParams<T>& params) {
  const auto launch = [&]<int threads>(std::integral_constant<int, threads>) {
    constexpr int kRows = threads / (head_dim / kElements);
    stream.launch("centroids", centroids_kernel<T, head_dim, threads, has_extremes>,
                  {call.max_blocks(), heads}, threads, kRows * head_dim * sizeof(float), params);
  };
  if (call.routing.block_size < kLargeBlock) {
    launch(std::integral_constant<int, kThreads>{});
  } else {
    launch(std::integral_constant<int, kManyThreads>{});
  }
}

template <typename T>
struct LayOutParams {
  View<const T> keys;  // a block each
  T* means;            // [heads, max_blocks, D]
  std::int64_t blocks, max_blocks, head0;
  std::int32_t head_dim;
};

/// Uses one thread for kElements of a row.
template <typename T>
MOBA_KERNEL(kThreads, 8)
lay_out_gate_keys_kernel(MOBA_GRID_CONSTANT LayOutParams<T> p) {
  const std::int64_t index = std::int64_t{ptx::block_x()} * kThreads + ptx::thread(), head = ptx::block_y();
  const std::int32_t columns = p.head_dim / kElements;
  const std::int64_t block = index / columns, column = index % columns * kElements;
  if (block >= p.blocks) return;
  T* to = p.means + mean_offset(head, p.max_blocks, block, p.head_dim) + column;
  *reinterpret_cast<ptx::Vec16*>(to) = ptx::load_streaming(p.keys.row(block, p.head0 + head) + column);
}

}  // namespace

void lay_out_gate_keys(Stream& stream, const DeviceCall& call, const WorkSlice& slice, void* means) {
  if (call.k.sizes[0] == 0) return;
  const auto launch = [&]<typename T>(T) {
    const LayOutParams<T> params{.keys = view_of<const T>(call.k),
                                 .means = static_cast<T*>(means),
                                 .blocks = call.k.sizes[0],
                                 .max_blocks = call.max_blocks(),
                                 .head0 = slice.head0,
                                 .head_dim = static_cast<std::int32_t>(call.head_dim)};
    stream.launch("lay_out_gate_keys", lay_out_gate_keys_kernel<T>,
                  {divide_up(params.blocks * call.head_dim / kElements, kThreads), slice.heads()}, kThreads,
                  0, params);
  };
  if (call.k.dtype == DType::bf16) {
    launch(bfloat16{});
  } else {
    launch(float16{});
  }
}

void centroids(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
               void* means) {
  with_type(call, [&]<typename T, int head_dim>() {
    launch_centroids<T, head_dim, false>(
        stream, call, slice.heads(),
        {.k = view_of<const T>(call.k),
         .mean = {static_cast<T*>(means), head_dim, call.max_blocks() * head_dim},
         .batch = batch,
         .block_size = call.routing.block_size,
         .head0 = slice.head0});
  });
}

void features(Stream& stream, const DeviceCall& call, const Batch& batch, const BlockFeatures& features) {
  with_type(call, [&]<typename T, int head_dim>() {
    launch_centroids<T, head_dim, true>(stream, call, call.kv_heads,
                                        {.k = view_of<const T>(call.k),
                                         .mean = view_of<T>(features.mean),
                                         .max = view_of<T>(features.max),
                                         .min = view_of<T>(features.min),
                                         .batch = batch,
                                         .block_size = call.routing.block_size});
  });
}

}  // namespace moba::cuda
