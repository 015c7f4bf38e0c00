#pragma once

#include "moba/tensor.h"

namespace moba::llm {

/// The arithmetic of a model.
struct Arithmetic {
  /// The dtype of the activations, and of the tiles that weights are expanded to in prefill: f32, bf16 or f16
  /// (whose products run in f32).
  DType dtype = DType::f32;
  /// Products of single rows with block formats round activations to int8 with one scale for 32 values, as
  /// llama.cpp does.
  bool int8_decode = false;
};

/// Returns the fastest arithmetic of this machine at bf16's accuracy or better: bf16 with int8_decode where
/// the CPU has fast bf16 products, else f32 with int8_decode.
Arithmetic best_arithmetic();

}  // namespace moba::llm
