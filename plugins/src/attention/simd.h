// SPDX-License-Identifier: Apache-2.0
// A register of floats of the instruction set being compiled for. Included by the kernels only; everything is in an
// unnamed namespace and plain C underneath, for the reason given in track_fusion/kernels.h.
#pragma once

// Element types as bits. Not every kernel needs all of them.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "common/numeric.h"
#pragma GCC diagnostic pop

namespace pt::attention {
namespace {

using numeric::AnyFloat;
using numeric::AnyHalf;
using numeric::Bfloat16;
using numeric::Float16;
using numeric::Float32;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kLanes)));
// The same for memory of any alignment and type.
typedef float VecMemory __attribute__((vector_size(4 * kLanes), aligned(1), may_alias));
typedef uint16_t HalfMemory __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
typedef int8_t ByteMemory __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline Vec load(const float* source) { return *reinterpret_cast<const VecMemory*>(source); }
inline void store(float* target, Vec value) { *reinterpret_cast<VecMemory*>(target) = value; }
inline Vec all(float value) { return value - Vec{}; }  // value - 0 keeps every bit of a number
inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

// a * b + c: fused where the instruction set has it, never left to the compiler, so that every caller gets one result.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Element types of keys and values: kLanes of them as floats. AVX-512 through full masks: GCC 12 warns about an
// undefined operand inside the unmasked forms.
struct StoredFloat32 {
  using Storage = float;
  static inline Vec load(const float* source) { return attention::load(source); }
};

// GCC 12 splits its own vector conversions in two, hence the intrinsics.
struct StoredBfloat16 {
  using Storage = uint16_t;
  static inline Vec load(const uint16_t* source) {
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, halves), 16));
#elif defined(__AVX2__)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const HalfMemory*>(source), WordVec) << 16);
#endif
  }
};

struct StoredFloat16 {
  using Storage = uint16_t;
  static inline Vec load(const uint16_t* source) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    Vec values;
    for (int i = 0; i < kLanes; ++i) values[i] = Float16::to_float(source[i]);
    return values;
#endif
  }
};

// The scale is applied to scores and probabilities, where it costs one multiplication per key.
struct StoredInt8 {
  using Storage = int8_t;
  static inline Vec load(const int8_t* source) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const ByteMemory*>(source), IntVec), Vec);
#endif
  }
};

// 2^x within 8e-8. Below 2^-126: 0; from 2^128: infinity; NaN stays NaN.
inline Vec exp2(Vec x) {
  const Vec low = all(-126.0f), high = all(128.0f), magic = all(12582912.0f);  // 1.5 * 2^23: the sum drops the fraction
  Vec y = select(x < low, low, x);
  y = select(y > high, high, y);
  const Vec whole = (y + magic) - magic, part = y - whole;
  Vec power = all(1.54614449e-4f);
  power = multiply_add(power, part, all(1.34004280e-3f));
  power = multiply_add(power, part, all(9.61805694e-3f));
  power = multiply_add(power, part, all(5.55032715e-2f));
  power = multiply_add(power, part, all(2.40226507e-1f));
  power = multiply_add(power, part, all(6.93147182e-1f));
  power = multiply_add(power, part, all(1.0f));
  // Through the magic number's low bits rather than a conversion, which is undefined for NaN.
  const IntVec exponent = reinterpret_cast<IntVec>(y + magic) - reinterpret_cast<IntVec>(magic) + 127;
  power *= reinterpret_cast<Vec>(reinterpret_cast<WordVec>(exponent) << 23);
  return select(x < low, Vec{}, power);
}

inline float max_lane(Vec value) {
  float largest = value[0];
  for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
  return largest;
}

// Lanes folded 8, 4, 2, 1.
inline float sum_lanes(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace pt::attention
