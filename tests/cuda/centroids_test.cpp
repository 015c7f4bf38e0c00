#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/stages.h"
#include "device_case.h"
#include "mirror.h"
#include "number.h"

namespace moba::cuda {
namespace {

using test::Case;
using test::on_device;

TEST(Centroids, MatchTheMeansOfTheKeys) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const std::int64_t head_dim : {64, 96, 128, 256}) {
      for (const std::int64_t block_size : {1, 3, 16, 100, 2050}) {
        const std::int32_t keys_end = block_size > 2048 ? 4105 : 205;
        Case c{.seed = 1, .dtype = dtype, .kv_heads = 2, .head_dim = head_dim};
        c.sequences = {{0, 0, 5, 5, 205}, {0, 0, 5, 5, keys_end}};
        c.routing = {.block_size = block_size, .top_k = 1};
        test::fill(c);
        const DeviceBatch starts = batch_of(c.sequences);
        test::Mirror mirror;
        const auto placed = [&](const test::Array& array) { return mirror.read(on_device(array.view())); };
        const DeviceCall call = make_call(placed(c.q), placed(c.k), placed(c.v), starts, c.routing);
        Stream stream({});
        std::vector<std::int32_t> q_starts(5), k_starts(5), blocks(5), tiles(5);
        const WorkSlice slice{1, 2, 0, call.tokens};
        const auto list = [&](std::vector<std::int32_t>& of) { return mirror.write(of.data(), 5); };
        const Batch batch =
            lay_out(stream, call, starts, slice, {list(q_starts), list(k_starts), list(blocks), list(tiles)});
        std::vector<std::uint16_t> means(static_cast<std::size_t>(call.max_blocks() * head_dim));
        centroids(stream, call, slice, batch,
                  mirror.write(means.data(), static_cast<std::int64_t>(means.size())));
        mirror.copy_back();
        EXPECT_EQ(k_starts, c.sequences.cu_seqlens_k);
        EXPECT_EQ(blocks.back(), divide_up(5, block_size) + divide_up(keys_end - 5, block_size));
        EXPECT_EQ(tiles, (std::vector<std::int32_t>{0, 0, 1, 1, 3}));

        std::size_t at = 0;
        for (const auto& [first, last] : {std::pair{0, 5}, std::pair{5, keys_end}}) {
          for (std::int64_t begin = first; begin < last; begin += block_size) {
            const std::int64_t end = std::min<std::int64_t>(begin + block_size, last);
            for (std::int64_t d = 0; d < head_dim; ++d) {
              double sum = 0;
              for (std::int64_t key = begin; key < end; ++key) sum += c.k.get(key, 1, d);
              const double expected = sum / static_cast<double>(end - begin);
              ASSERT_NEAR(load(means.data(), dtype, static_cast<std::int64_t>(at++)), expected,
                          1e-6 + std::fabs(expected) * (dtype == DType::bf16 ? 0x1p-8 : 0x1p-11))
                  << "D " << head_dim << ", B " << block_size << ", key " << begin << ", element " << d;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace moba::cuda
