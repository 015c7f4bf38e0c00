#pragma once

/// Constants of the softmax in units of log2, for kernels that compute powers of 2 instead of powers of e.
namespace moba {

/// log2(e) and ln(2).
constexpr float kLog2E = 1.44269504F, kLn2 = 0.69314718F;

}  // namespace moba
