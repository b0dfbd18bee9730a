// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes, the unit of every transfer, as elements and as words; and arithmetic that rounds alike on host and
// device. Host code must be compiled with -ffp-contract=off.
#pragma once

#include <math.h>

#include "common/numeric.h"

namespace pt::cuda_fusion {

struct alignas(16) Vector {
  uint32_t word[4];
};

struct alignas(8) Pair {
  uint32_t word[2];
};

namespace {

// "Not yet arrived." As two halves it is (+0, -0), as a float -0: a sender gives up no more than the sign of a zero.
// Always compared as an integer: under fast-math a float comparison would take denormals for zeros.
constexpr uint32_t kSentinel = 0x80000000u;

// Elements of Type in a vector.
template <typename Type>
constexpr int kPerVector = sizeof(typename Type::Storage) == 4 ? 4 : 8;

PT_HOST_DEVICE Vector filled(uint32_t word) { return {{word, word, word, word}}; }

// Every word is checked: sixteen bytes are stored together, but need not become visible together.
PT_HOST_DEVICE bool has_sentinel(const Vector& v) {
  return v.word[0] == kSentinel || v.word[1] == kSentinel || v.word[2] == kSentinel || v.word[3] == kSentinel;
}

PT_HOST_DEVICE Vector without_sentinel(Vector v) {
  for (uint32_t& word : v.word) word = word == kSentinel ? 0u : word;
  return v;
}

PT_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PT_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 1 / sqrt(sum / count + eps), every step rounded to nearest.
PT_HOST_DEVICE float inverse_root_mean(float sum, float count, float eps) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, count), eps)));
#else
  return 1.0f / sqrtf(sum / count + eps);
#endif
}

// An element as it is stored, bit by bit.
template <typename Type>
PT_HOST_DEVICE typename Type::Storage stored(const Vector& v, int i) {
  if constexpr (kPerVector<Type> == 4) {
    return numeric::float_of(v.word[i]);
  } else {
    return static_cast<uint16_t>(v.word[i / 2] >> (i % 2 * 16));
  }
}

template <typename Type>
PT_HOST_DEVICE float element(const Vector& v, int i) {
  return Type::to_float(stored<Type>(v, i));
}

// Element `i` of a vector that has a zero there.
template <typename Type>
PT_HOST_DEVICE void put_stored(Vector& v, int i, typename Type::Storage bits) {
  if constexpr (kPerVector<Type> == 4) {
    v.word[i] = numeric::bits_of(bits);
  } else {
    v.word[i / 2] |= static_cast<uint32_t>(bits) << (i % 2 * 16);
  }
}

template <typename Type>
PT_HOST_DEVICE Vector packed(const float* values) {
  Vector v;
  for (int w = 0; w < 4; ++w) {
    if constexpr (kPerVector<Type> == 4) {
      v.word[w] = numeric::bits_of(Type::from_float(values[w]));
    } else {
      v.word[w] = Type::from_float(values[2 * w]) | static_cast<uint32_t>(Type::from_float(values[2 * w + 1])) << 16;
    }
  }
  return v;
}

}  // namespace
}  // namespace pt::cuda_fusion
