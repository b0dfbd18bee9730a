// SPDX-License-Identifier: Apache-2.0
// Element types as bits, and tiles of them to and from fp32. Every loop has no branch, so that it vectorises.
// All in an unnamed namespace, so that no copy made for one instruction set can stand in for another.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/host_device.h"

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace pt::numeric {
namespace {

// Loads and stores through these are legal at any address and may alias anything.
typedef float AnyFloat __attribute__((aligned(1), may_alias));
typedef uint16_t AnyHalf __attribute__((aligned(1), may_alias));

constexpr uint32_t kQuietNan = 0x7FC00000u;

PT_HOST_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
PT_HOST_DEVICE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

// One NaN for all: which operand's payload survives an addition depends on the instruction the compiler chose.
PT_HOST_DEVICE uint32_t canonical_bits(float value) { return value != value ? kQuietNan : bits_of(value); }

struct Float32 {
  using Storage = AnyFloat;
  static PT_HOST_DEVICE float to_float(float value) { return value; }
  static PT_HOST_DEVICE float from_float(float value) { return float_of(canonical_bits(value)); }
};

struct Bfloat16 {
  using Storage = AnyHalf;
  static PT_HOST_DEVICE float to_float(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }
  static PT_HOST_DEVICE uint16_t from_float(float value) {
    const uint32_t bits = canonical_bits(value);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Storage = AnyHalf;
  static PT_HOST_DEVICE float to_float(uint16_t value) {
    const uint32_t sign = (static_cast<uint32_t>(value) & 0x8000u) << 16;
    const uint32_t magnitude = (static_cast<uint32_t>(value) & 0x7FFFu) << 13;
    const uint32_t exponent = magnitude & 0x0F800000u;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23);
    // 2^-14 + m * 2^-24 minus 2^-14 is exact and meets no fp32 denormal.
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t finite = exponent == 0 ? subnormal : normal;
    return float_of(sign | (exponent == 0x0F800000u ? special : finite));
  }
  static PT_HOST_DEVICE uint16_t from_float(float value) {
    const uint32_t bits = canonical_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 aligns the mantissa so that the hardware's own rounding drops the right bits.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? special : finite));
  }
};

// values[i] = fp32 of source[i]
template <typename Type>
inline void load_tile(const typename Type::Storage* __restrict source, float* __restrict values, size_t count) {
  for (size_t i = 0; i < count; ++i) values[i] = Type::to_float(source[i]);
}

// values[i] += fp32 of source[i]. Not inlined: GCC would swap this loop with the caller's loop over ranks and vectorise
// neither.
template <typename Type>
__attribute__((noinline)) void add_tile(const typename Type::Storage* __restrict source, float* __restrict values,
                                        size_t count) {
  for (size_t i = 0; i < count; ++i) values[i] += Type::to_float(source[i]);
}

template <typename Type>
inline void store_tile(const float* __restrict values, typename Type::Storage* __restrict target, size_t count) {
  for (size_t i = 0; i < count; ++i) target[i] = Type::from_float(values[i]);
}

#if defined(__F16C__) && !defined(__CUDACC__)
// Same bits as the loops above (NaN is made canonical before the conversion), one instruction per eight elements.
inline __m256 load_half8(const AnyHalf* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}

template <>
inline void load_tile<Float16>(const AnyHalf* __restrict source, float* __restrict values, size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(values + i, load_half8(source + i));
  for (; i < count; ++i) values[i] = Float16::to_float(source[i]);
}

template <>
__attribute__((noinline)) void add_tile<Float16>(const AnyHalf* __restrict source, float* __restrict values,
                                                 size_t count) {
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(values + i, _mm256_add_ps(_mm256_loadu_ps(values + i), load_half8(source + i)));
  }
  for (; i < count; ++i) values[i] += Float16::to_float(source[i]);
}

template <>
inline void store_tile<Float16>(const float* __restrict values, AnyHalf* __restrict target, size_t count) {
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(kQuietNan)));
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 value = _mm256_loadu_ps(values + i);
    value = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  for (; i < count; ++i) target[i] = Float16::from_float(values[i]);
}
#endif

}  // namespace
}  // namespace pt::numeric
