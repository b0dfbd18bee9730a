// SPDX-License-Identifier: Apache-2.0
// Float weights times float activations: O outputs by R rows in registers, every weight widened once for all R rows.
#pragma once

#include "linear/operand.h"

namespace pt::linear {
namespace {

// Sums of a tile between pieces: [output][row][lane].
struct Accumulators {
  alignas(64) float sums[kTileOutputs][kMaxOperandRows][kLanes];
};

// Each type gives two vectors of weights per step of 2 * kLanes inputs, in the order `operand.h` puts x.
struct Float32Weights {
  static constexpr size_t kElementBytes = 4;
  static inline Floats first(const char* step) { return load<Floats>(step); }
  static inline Floats second(const char* step) { return load<Floats>(step + kBytes); }
};

struct Bfloat16Weights {
  static constexpr size_t kElementBytes = 2;
  static inline Floats first(const char* step) { return (Floats)(load<Words>(step) << 16); }
  static inline Floats second(const char* step) { return (Floats)(load<Words>(step) & 0xFFFF0000u); }
};

struct Float16Weights {
  static constexpr size_t kElementBytes = 2;
  static inline Floats first(const char* step) { return widen(step); }
  static inline Floats second(const char* step) { return widen(step + kShorts); }
  static inline Floats widen(const char* source) {
#if defined(__AVX512BW__)
    return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(source));  // GCC 12 warns about the plain form
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(source));
#else
    Floats value;
    for (size_t i = 0; i < kLanes; ++i) {
      value[i] = Float16::to_float(reinterpret_cast<const numeric::AnyHalf*>(source)[i]);
    }
    return value;
#endif
  }
};

template <typename Weights>
struct FloatTile {
  static constexpr size_t kManyRows = 4, kManyRowsOutputs = 2;
  static constexpr size_t kFewRows = 2, kFewRowsOutputs = 4;
  static constexpr size_t kPrefetchPieces = 2;

  const pt_linear_weight& weight;
  const Operand& operand;
  Accumulators& accumulators;

  FloatTile(const pt_linear_weight& w, const Operand& o, Accumulators& a) : weight(w), operand(o), accumulators(a) {}

  static size_t row_bytes(const pt_linear_weight& weight) { return weight.in * Weights::kElementBytes; }
  static size_t offset_bytes(size_t input) { return input * Weights::kElementBytes; }
  void begin_piece(size_t, size_t, size_t, size_t) {}
  void end_piece(size_t, size_t) {}
  float output_scale(size_t) const { return 1.0f; }

  // Adds inputs [begin, begin + count) of O outputs (from `output` of this tile) times R rows (from `row`).
  template <size_t O, size_t R>
  PT_TILE void multiply(const char* weights, uintptr_t ahead, size_t output, size_t row, size_t begin, size_t count) {
    const size_t pitch = row_bytes(weight), x_pitch = operand.row_bytes;
    const char* x = operand.rows + row * x_pitch + begin * sizeof(float);
    Floats sum[O][R];
    unroll<O>([&](auto o) PT_UNROLLED {
      unroll<R>([&](auto r) PT_UNROLLED { sum[o][r] = load<Floats>(accumulators.sums[output + o][row + r]); });
    });
    const auto step_sums = [&](const Floats(&w)[O], const char* values_at) PT_UNROLLED {
      unroll<R>([&](auto r) PT_UNROLLED {
        const auto values = load_once<Floats>(values_at + r * x_pitch);
        unroll<O>([&](auto o) PT_UNROLLED { sum[o][r] = fused_multiply_add(w[o], values, sum[o][r]); });
      });
    };
    for (size_t i = 0; i < count; i += 2 * kLanes) {
      const char* step = weights + i * Weights::kElementBytes;
      const char* values_at = x + i * sizeof(float);
      if (ahead != 0) {
        unroll<O>([&](auto o) PT_UNROLLED { prefetch(ahead + o * pitch + i * Weights::kElementBytes); });
      }
      Floats w[O];
      unroll<O>([&](auto o) PT_UNROLLED { w[o] = Weights::first(step + o * pitch); });
      step_sums(w, values_at);
      forget(step);
      unroll<O>([&](auto o) PT_UNROLLED { w[o] = Weights::second(step + o * pitch); });
      step_sums(w, values_at + kBytes);
    }
    unroll<O>([&](auto o) PT_UNROLLED {
      unroll<R>([&](auto r) PT_UNROLLED { store(accumulators.sums[output + o][row + r], sum[o][r]); });
    });
  }
};

}  // namespace
}  // namespace pt::linear
