#include "llm/model/few_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "llm/formats/dequantise.h"
#include "moba/attention.h"
#include "src/number.h"

namespace moba::llm {
namespace {

constexpr Storage kStorages[] = {Storage::f32,  Storage::f16,  Storage::bf16, Storage::q4_0, Storage::q4_1,
                                 Storage::q5_0, Storage::q5_1, Storage::q8_0, Storage::q2_k, Storage::q3_k,
                                 Storage::q4_k, Storage::q5_k, Storage::q6_k};

/// Random blocks whose scales, the halves at the places of each format, are about 2^-7 to 2^-5 of either
/// sign.
struct RandomWeights {
  std::vector<std::byte> bytes;
  StoredTensor tensor;

  RandomWeights(Storage storage, std::int64_t rows, std::int64_t columns, std::mt19937& random) {
    tensor.storage = storage;
    tensor.shape = {rows, columns};
    const StorageBlock block = block_of(storage);
    bytes.resize(static_cast<std::size_t>(rows * tensor.row_bytes()));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random() & 0xFF);
    for (std::size_t at = 0; at < bytes.size(); at += static_cast<std::size_t>(block.bytes)) {
      if (block.values == 1) {
        put_number(storage, at, random);
      } else {
        for (const std::size_t place : places_of_halves(storage)) put_half(at + place, random);
      }
    }
    tensor.bytes = bytes;
  }

  static std::vector<std::size_t> places_of_halves(Storage storage) {
    switch (storage) {
      case Storage::q4_1:
      case Storage::q5_1:
      case Storage::q4_k:
      case Storage::q5_k:
        return {0, 2};
      case Storage::q2_k:
        return {80, 82};
      case Storage::q3_k:
        return {108};
      case Storage::q6_k:
        return {208};
      default:
        return {0};
    }
  }

  void put(std::size_t at, const void* value, std::size_t size) {
    std::memcpy(bytes.data() + at, value, size);
  }

  void put_half(std::size_t at, std::mt19937& random) {
    const auto bits = static_cast<std::uint16_t>(0x2000 | (random() & 0x87FF));
    put(at, &bits, sizeof bits);
  }

  void put_number(Storage storage, std::size_t at, std::mt19937& random) {
    const float value = std::normal_distribution<float>()(random);
    const std::uint16_t half = storage == Storage::bf16 ? to_bfloat16(value).bits : to_float16(value).bits;
    if (storage == Storage::f32) {
      put(at, &value, sizeof value);
    } else {
      put(at, &half, sizeof half);
    }
  }
};

class FewRowsProducts : public ::testing::TestWithParam<Storage> {
 protected:
  void SetUp() override {
    if (cpu_target().empty()) GTEST_SKIP() << "this machine lacks the instruction set of MOBA_CPU_TARGET";
  }

  /// Compares products of `rows` rows of activations with sums in double.
  void check(std::int64_t rows, std::int64_t columns, bool round);
};

/// The bound of the rounding errors of a sum of `terms` f32 products whose magnitudes sum to `magnitude`.
double bound(std::int64_t terms, double magnitude) {
  return static_cast<double>(terms + 4) * 0x1p-24 * magnitude;
}

void FewRowsProducts::check(std::int64_t rows, std::int64_t columns, bool round) {
  std::mt19937 random(7);
  constexpr std::int64_t kOutputs = 5;
  RandomWeights weights(GetParam(), kOutputs, columns, random);
  const std::int64_t stride = columns + 3, y_stride = kOutputs + 2;
  std::vector<float> x(static_cast<std::size_t>(rows * stride));
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  const std::vector<std::int32_t> source{3, 0, 4, 2, 1};

  FewRows few{.values = x.data(), .rows = rows, .columns = columns, .stride = stride};
  if (round) round_to_int8(few);
  std::vector<float> y(static_cast<std::size_t>(rows * y_stride), std::numeric_limits<float>::quiet_NaN());
  multiply_few_rows(few, weights.tensor, source.data(), 0, 2, y.data(), y_stride);
  multiply_few_rows(few, weights.tensor, source.data(), 2, kOutputs, y.data(), y_stride);

  std::vector<float> w(static_cast<std::size_t>(columns));
  for (std::int64_t i = 0; i < kOutputs; ++i) {
    dequantise(weights.tensor, source[static_cast<std::size_t>(i)], 1, w.data());
    for (std::int64_t row = 0; row < rows; ++row) {
      double exact = 0, magnitude = 0, largest = 0;
      for (const float value : w) largest = std::max(largest, std::fabs(static_cast<double>(value)));
      for (std::int64_t j = 0; j < columns; ++j) {
        double value = x[static_cast<std::size_t>(row * stride + j)];
        if (round) {
          const auto at = static_cast<std::size_t>(row * few.groups * 32 + j);
          value = static_cast<double>(few.scale[at / 32]) * few.level[at];
        }
        const double weight = w[static_cast<std::size_t>(j)];
        exact += value * weight;
        // With int8 the constant offset of a format is summed apart, which is at most twice the largest
        // weight.
        magnitude += std::fabs(value) * (round ? std::fabs(weight) + 4 * largest : std::fabs(weight));
      }
      EXPECT_NEAR(y[static_cast<std::size_t>(row * y_stride + i)], exact, bound(columns, magnitude))
          << "row " << row << ", output " << i;
    }
    EXPECT_TRUE(std::isnan(y[static_cast<std::size_t>(kOutputs)])) << "written past the outputs";
  }
}

TEST_P(FewRowsProducts, AreExactWithinTheRoundingOfF32Sums) {
  const std::int64_t block = block_of(GetParam()).values;
  for (const std::int64_t rows : {1, 3, 8}) {
    for (const std::int64_t blocks : {1, 2, 7, 9, 33}) {
      for (const bool round : {false, true}) {
        if (round && block == 1) continue;
        SCOPED_TRACE(::testing::Message() << rows << " x " << block * blocks << (round ? ", int8" : ", f32"));
        check(rows, block * blocks, round);
      }
    }
  }
}

/// Rows that are multiplied together keep the bits of a row alone.
TEST_P(FewRowsProducts, DoNotDependOnTheOtherRows) {
  if (block_of(GetParam()).values == 1) return;  // never rounded
  std::mt19937 random(13);
  constexpr std::int64_t kOutputs = 3;
  const std::int64_t columns = 9 * block_of(GetParam()).values;
  const RandomWeights weights(GetParam(), kOutputs, columns, random);
  std::vector<float> x(static_cast<std::size_t>(kFewRows * columns));
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  const auto product = [&](std::int64_t first, std::int64_t rows) {
    FewRows few{.values = x.data() + first * columns, .rows = rows, .columns = columns, .stride = columns};
    round_to_int8(few);
    std::vector<float> y(static_cast<std::size_t>(rows * kOutputs));
    multiply_few_rows(few, weights.tensor, nullptr, 0, kOutputs, y.data(), kOutputs);
    return y;
  };
  std::vector<float> alone;
  for (std::int64_t row = 0; row < kFewRows; ++row) {
    const std::vector<float> y = product(row, 1);
    alone.insert(alone.end(), y.begin(), y.end());
  }
  for (std::int64_t rows = 1; rows <= kFewRows; ++rows) {
    const std::vector<float> expected(alone.begin(), alone.begin() + rows * kOutputs);
    EXPECT_EQ(product(0, rows), expected) << rows << " rows";
  }
}

/// Row 1 of three has a value that is not finite: its products are f32's, and the other rows keep their bits.
TEST_P(FewRowsProducts, KeepNanAndInfinity) {
  if (block_of(GetParam()).values == 1) return;  // never rounded
  std::mt19937 random(11);
  constexpr std::int64_t kRows = 3, kOutputs = 4;
  const std::int64_t columns = 2 * std::max<std::int64_t>(block_of(GetParam()).values, 64);
  const RandomWeights weights(GetParam(), kOutputs, columns, random);
  std::vector<float> x(static_cast<std::size_t>(kRows * columns));
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  const auto product = [&](bool round) {
    FewRows few{.values = x.data(), .rows = kRows, .columns = columns, .stride = columns};
    if (round) round_to_int8(few);
    std::vector<float> y(static_cast<std::size_t>(kRows * kOutputs));
    multiply_few_rows(few, weights.tensor, nullptr, 0, kOutputs, y.data(), kOutputs);
    return y;
  };
  const std::vector<float> finite = product(/*round=*/true);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInf, -kInf}) {
    for (const std::int64_t column : {std::int64_t{0}, columns / 2 + 5, columns - 1}) {
      SCOPED_TRACE(::testing::Message() << value << " in column " << column);
      float& place = x[static_cast<std::size_t>(columns + column)];
      const float before = std::exchange(place, value);
      const std::vector<float> rounded = product(/*round=*/true), exact = product(/*round=*/false);
      place = before;
      for (std::size_t i = 0; i < kRows * kOutputs; ++i) {
        const bool is_spoiled = i / kOutputs == 1;
        const float expected = is_spoiled ? exact[i] : finite[i];
        EXPECT_EQ(std::isfinite(rounded[i]), !is_spoiled) << "output " << i;
        EXPECT_TRUE(rounded[i] == expected || (std::isnan(rounded[i]) && std::isnan(expected)))
            << "output " << i << ": " << rounded[i] << " instead of " << expected;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FewRowsProducts, ::testing::ValuesIn(kStorages),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST(RoundToInt8, IsWithinHalfAStepOfTheLargestOf32) {
  std::mt19937 random(3);
  std::vector<float> x(96);
  for (std::size_t i = 0; i < 32; ++i) x[i] = std::ldexp(static_cast<float>(random() % 1000) - 500, -12);
  for (std::size_t i = 64; i < 96; ++i) x[i] = std::ldexp(static_cast<float>(random() % 1000) - 500, 100);
  FewRows few{.values = x.data(), .rows = 1, .columns = 96, .stride = 96};
  round_to_int8(few);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float step = few.scale[i / 32];
    EXPECT_NEAR(static_cast<float>(few.level[i]) * step, x[i], 0.501F * step);
  }
  EXPECT_EQ(few.scale[1], 0.0F) << "of zeros";
  EXPECT_EQ(few.sum[1], 0.0F);
}

TEST(RoundToInt8, RoundsSubnormalGroupsToZero) {
  std::vector<float> x(32, 1e-40F);
  FewRows few{.values = x.data(), .rows = 1, .columns = 32, .stride = 32};
  round_to_int8(few);
  EXPECT_EQ(few.level[0], 0);
  EXPECT_EQ(few.sum[0], 0.0F);
}

TEST(Dequantise, RoundsToTheNearestBf16) {
  std::mt19937 random(5);
  for (const Storage storage : kStorages) {
    const std::int64_t columns = 3 * block_of(storage).values;
    RandomWeights weights(storage, 4, columns, random);
    std::vector<float> wide(static_cast<std::size_t>(4 * columns));
    std::vector<bfloat16> rounded(wide.size());
    dequantise(weights.tensor, 0, 4, wide.data());
    dequantise(weights.tensor, 0, 4, rounded.data());
    for (std::size_t i = 0; i < wide.size(); ++i) {
      ASSERT_EQ(rounded[i].bits, to_bfloat16(wide[i]).bits) << name_of(storage) << ", value " << i;
    }
  }
}

}  // namespace
}  // namespace moba::llm
