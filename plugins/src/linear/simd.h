// SPDX-License-Identifier: Apache-2.0
// Vectors of the width this file is compiled for. GCC's vector types carry the plain arithmetic; intrinsics appear only
// where the language has no operator for the instruction. All in an unnamed namespace: see kernels.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Of the conversions only loads and stores are used here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "common/numeric.h"
#pragma GCC diagnostic pop

// A function per tile size: inlined into each other, they take each other's registers.
#define PT_TILE __attribute__((noinline))

namespace pt::linear {
namespace {

#if defined(__AVX512BW__)
constexpr size_t kBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kBytes = 32;
#else
constexpr size_t kBytes = 16;
#endif
constexpr size_t kLanes = kBytes / 4;
constexpr size_t kShorts = kBytes / 2;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef int16_t Shorts __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes)));
typedef int8_t NarrowBytes __attribute__((vector_size(kShorts)));

// Any address, any type behind it: weights come straight from a mapped file.
template <typename Vector>
inline Vector load(const void* source) {
  typedef Vector Unaligned __attribute__((aligned(1), may_alias));
  return *static_cast<const Unaligned*>(source);
}

// Has the value computed by here. Left alone, GCC puts additions of an unrolled block off to its end, and spills.
template <typename Vector>
inline void settle(Vector& value) {
#if defined(__AVX512BW__)
  __asm__ volatile("" : "+v"(value));
#elif defined(__SSE2__)
  __asm__ volatile("" : "+x"(value));
#endif
}

// A load that stays one: the compiler would rather repeat it as an operand of every instruction that uses the value,
// and loads are what the tiles run out of.
template <typename Vector>
inline Vector load_once(const void* source) {
#if defined(__AVX512BW__)
  Vector value;
  __asm__("vmovups %1, %0" : "=v"(value) : "m"(*static_cast<const char (*)[kBytes]>(source)));
  return value;
#elif defined(__AVX2__)
  Vector value;
  __asm__("vmovups %1, %0" : "=x"(value) : "m"(*static_cast<const char (*)[kBytes]>(source)));
  return value;
#else
  return load<Vector>(source);
#endif
}

template <typename Vector>
inline void store(void* target, Vector value) {
  typedef Vector Unaligned __attribute__((aligned(1), may_alias));
  *static_cast<Unaligned*>(target) = value;
}

inline Floats broadcast(float value) { return value - Floats{}; }

// a * b + c, fused where the instruction set can; spelled out so that every tile size rounds alike.
inline Floats fused_multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Products of 16-bit neighbours, summed in pairs.
inline Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  // On a little-endian machine the even element is the low half.
  return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

inline Shorts load_int8(const void* source) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_cvtepi8_epi16(load<__m256i>(source));
#elif defined(__AVX2__)
  return (Shorts)_mm256_cvtepi8_epi16(load<__m128i>(source));
#elif !defined(__SSE2__)
  return __builtin_convertvector(load<NarrowBytes>(source), Shorts);
#else
  const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
  return (Shorts)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#endif
}

// Calls body(0), ..., body(N - 1) with constants. GCC turns local arrays into registers before it unrolls loops, so a
// tile that loops over its registers would keep them in memory.
template <size_t I>
struct Index {
  constexpr operator size_t() const { return I; }
};
#define PT_UNROLLED __attribute__((always_inline))
template <size_t N, size_t I = 0, typename Body>
PT_UNROLLED inline void unroll(const Body& body) {
  if constexpr (I < N) {
    body(Index<I>{});
    unroll<N, I + 1>(body);
  }
}

// Floats of consecutive groups of kGroup weights, spread over the lanes that hold a vector's sums: eight weights each.
template <size_t kGroup>
inline Floats spread(const float* per_group) {
  if constexpr (kGroup >= 8 * kLanes) {
    return broadcast(*per_group);
  } else {
    Ints lanes;
    unroll<kLanes>([&](auto i) PT_UNROLLED { lanes[size_t{i}] = static_cast<int>(8 * i / kGroup); });
    return __builtin_shuffle(load<Floats>(per_group), lanes);
  }
}

// Sum of the lanes, halves folded onto each other: the order depends on the instruction set only.
template <size_t kHalf = kLanes / 2>
PT_UNROLLED inline float fold(Floats value) {
  if constexpr (kHalf == 0) {
    return value[0];
  } else {
    Ints lanes;
    unroll<kLanes>([&](auto i) PT_UNROLLED { lanes[size_t{i}] = static_cast<int>((i + kHalf) % kLanes); });
    return fold<kHalf / 2>(value + __builtin_shuffle(value, lanes));
  }
}

// Makes the compiler load again what it holds already: registers are scarcer than loads in the tiles.
template <typename Pointer>
inline void forget(Pointer& pointer) {
  __asm__("" : "+r"(pointer));
}

inline void prefetch(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 3); }

}  // namespace
}  // namespace pt::linear
