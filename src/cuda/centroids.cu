// Block means in one pass over the keys: one thread block per block and head, larger where blocks are large
// and few.
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
  T* means;  // [heads, max_blocks, D]
  Batch batch;
  std::int64_t block_size, max_blocks, head0;
};

template <typename T>
MOBA_DEVICE void add(float (&sum)[kElements], const ptx::Vec16& v) {
  const std::uint32_t pairs[] = {v.x, v.y, v.z, v.w};
  MOBA_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += ptx::unpack_low<T>(pairs[i]);
    sum[2 * i + 1] += ptx::unpack_high<T>(pairs[i]);
  }
}

template <typename T, int head_dim, int threads>
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
  float sum[kElements] = {};
  if (row < kRows) {
    const T* from = p.k.row(first_key, p.head0 + head) + column * kElements;
    std::int32_t key = keys.begin + row;
    for (; key + (kUnroll - 1) * kRows < keys.end; key += kUnroll * kRows) {
      ptx::Vec16 loaded[kUnroll];
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i)
        loaded[i] = ptx::load_streaming(from + (key + i * kRows) * p.k.token_stride);
      MOBA_UNROLL
      for (int i = 0; i < kUnroll; ++i) add<T>(sum, loaded[i]);
    }
    for (; key < keys.end; key += kRows) add<T>(sum, ptx::load_streaming(from + key * p.k.token_stride));
  }

  // Sums of the threads are added in the order of their rows.
  auto* sums = reinterpret_cast<float*>(ptx::shared());  // [kRows, D]
  if (row < kRows) {
    MOBA_UNROLL
    for (int i = 0; i < kElements; ++i) sums[row * head_dim + column * kElements + i] = sum[i];
  }
  ptx::syncthreads();
  const float count = static_cast<float>(keys.end - keys.begin);
  auto* mean = reinterpret_cast<std::uint32_t*>(p.means + mean_offset(head, p.max_blocks, packed, head_dim));
  for (int pair = ptx::thread(); pair < head_dim / 2; pair += threads) {
    float low = 0, high = 0;
    MOBA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      low += sums[r * head_dim + 2 * pair];
      high += sums[r * head_dim + 2 * pair + 1];
    }
    mean[pair] = ptx::pack<T>(low / count, high / count);
  }
}

}  // namespace

void centroids(Stream& stream, const DeviceCall& call, const WorkSlice& slice, const Batch& batch,
               void* means) {
  with_type(call, [&]<typename T, int head_dim>() {
    const CentroidsParams<T> params{.k = view_of<const T>(call.k),
                                    .means = static_cast<T*>(means),
                                    .batch = batch,
                                    .block_size = call.routing.block_size,
                                    .max_blocks = call.max_blocks(),
                                    .head0 = slice.head0};
    const auto launch = [&]<int threads>(std::integral_constant<int, threads>) {
      constexpr int kRows = threads / (head_dim / kElements);
      stream.launch("centroids", centroids_kernel<T, head_dim, threads>, {call.max_blocks(), slice.heads()},
                    threads, kRows * head_dim * sizeof(float), params);
    };
    if (call.routing.block_size < kLargeBlock) {
      launch(std::integral_constant<int, kThreads>{});
    } else {
      launch(std::integral_constant<int, kManyThreads>{});
    }
  });
}

}  // namespace moba::cuda
