// Attention over random data, dense and with MoBA: the selected blocks, the time, and the largest difference
// of the outputs.
#include <moba/attention.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

constexpr std::int64_t kTokens = 8192, kHeads = 4, kKvHeads = 2, kHeadDim = 64;

std::vector<float> random_values(std::int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

int main() {
  const std::vector<float> q = random_values(kTokens * kHeads * kHeadDim, 1);
  const std::vector<float> k = random_values(kTokens * kKvHeads * kHeadDim, 2);
  const std::vector<float> v = random_values(kTokens * kKvHeads * kHeadDim, 3);
  const moba::Sequences sequences = moba::one_sequence(kTokens);

  std::vector<float> full;
  for (const std::int64_t top_k : {16, 3}) {  // 16 blocks of 512 tokens cover all 8192 keys
    const moba::Routing routing{.block_size = 512, .top_k = top_k};
    std::vector<float> out(q.size());
    std::vector<std::int32_t> blocks(kHeads * kTokens * moba::selection_width(sequences, routing));

    const auto start = std::chrono::steady_clock::now();
    moba::attention(moba::view(q.data(), {kTokens, kHeads, kHeadDim}),
                    moba::view(k.data(), {kTokens, kKvHeads, kHeadDim}),
                    moba::view(v.data(), {kTokens, kKvHeads, kHeadDim}), sequences, routing,
                    {.out = moba::view(out.data(), {kTokens, kHeads, kHeadDim}), .selection = blocks.data()});
    const auto time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start);

    if (full.empty()) full = out;
    double difference = 0;
    for (std::size_t i = 0; i < out.size(); ++i)
      difference = std::fmax(difference, std::fabs(out[i] - full[i]));
    std::printf("top-k %2d: %6.1f ms, largest difference from full %.3f, the last token selects blocks",
                int(top_k), time.count(), difference);
    for (auto block = blocks.end() - top_k; block != blocks.end(); ++block) std::printf(" %d", *block);
    std::printf("\n");
  }
}
