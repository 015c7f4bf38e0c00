#pragma once

#include <limits>

/// Constants of the softmax; the kernels compute powers of 2 instead of powers of e.
namespace moba {

/// log2(e) and ln(2).
constexpr float kLog2E = 1.44269504F, kLn2 = 0.69314718F;
/// Score of a key or block that cannot be attended to, and log-sum-exp of a row that sees nothing.
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

}  // namespace moba
