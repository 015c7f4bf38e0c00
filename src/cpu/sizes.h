#pragma once

#include <cstddef>
#include <cstdint>

/// Sizes shared by the stages of the CPU backend, whatever the instruction set.
namespace moba::cpu {

constexpr std::size_t kMaxHeadDim = 256;
/// Keys per key tile, which is packed and processed at a time: with D = 128, the packed keys and values take
/// 256 KiB, half of a small second-level cache.
constexpr std::size_t kKeyTileSize = 256;
/// Floats that a packed key tile takes for each dimension: three parts of bf16 are half as long again.
constexpr std::size_t kPackedFloats = kKeyTileSize * 3 / 2;
/// Rows of one task of the gate: packing a panel of means costs little beside that many, and their lists stay
/// in cache.
constexpr std::int64_t kGateRows = 896;
/// Widest vector, in floats; the number of rows of the tallest tile; the columns of the widest panel.
constexpr std::size_t kMaxLanes = 16, kMaxTileRows = 32, kMaxCols = 2 * kMaxLanes;
/// Rows that a tile's buffers hold: bf16 tiles may run past the last one.
constexpr std::size_t kTileCapacity = kMaxTileRows + 4;
/// Strides, in floats, of a tile's gathered rows and of its scores. The 16 extra keep rows out of each
/// other's cache sets.
constexpr std::size_t kRowStride = kMaxHeadDim + 16, kScoreStride = kKeyTileSize + 16;
/// Strides, in bf16 values, of rows and weights in bf16, and the parts that an f32 is split into.
constexpr std::size_t kBf16RowStride = kMaxHeadDim + 32, kWeightStride = kKeyTileSize + 32, kMaxParts = 3;

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Floats of an accumulator row: whole panels for every instruction set.
constexpr std::size_t padded_dim(std::int64_t head_dim) {
  return round_up(static_cast<std::size_t>(head_dim), kMaxCols);
}

/// Rows and scores of a tile, and what packing needs, of one worker.
struct alignas(64) TileScratch {
  float rows[kTileCapacity * kRowStride];
  float scores[kTileCapacity * kScoreStride];
  float f32_rows[(kMaxLanes + 1) * kMaxHeadDim];  // the last row stays zero
  float row_max[kMaxTileRows], top[kMaxTileRows], rescale[kMaxTileRows];
  float* out[kMaxTileRows];
  std::size_t visible[kMaxTileRows];  // keys of the key tile that a row sees
  float product[kTileCapacity * kRowStride];
  std::uint16_t bf16_rows[kMaxParts * kTileCapacity * kBf16RowStride];  // bf16 arithmetic, as is what follows
  std::uint16_t weights[kMaxParts * kTileCapacity * kWeightStride];
  std::uint32_t words[kMaxParts * kMaxLanes * kMaxHeadDim / 2];
};

}  // namespace moba::cpu
