// SPDX-License-Identifier: Apache-2.0
// Integer weights times 16-bit activations: exact integer sums inside a block, float32 across blocks.
#pragma once

#include "linear/float_tile.h"

namespace pt::linear {
namespace {

// The common part: where rows, scales and sums lie.
struct IntTile {
  static constexpr size_t kManyRows = 4, kManyRowsOutputs = 2;
  static constexpr size_t kFewRows = 2, kFewRowsOutputs = 4;

  const pt_linear_weight& weight;
  const Operand& operand;
  Accumulators& accumulators;

  IntTile(const pt_linear_weight& w, const Operand& o, Accumulators& a) : weight(w), operand(o), accumulators(a) {}

  const char* codes(size_t row, size_t begin) const {
    return operand.rows + row * operand.row_bytes + begin * sizeof(int16_t);
  }
  // exact[o][r] += pairs of w[o] times a vector of codes of row r.
  template <size_t O, size_t R>
  static PT_UNROLLED void multiply_codes(const Shorts (&w)[O], const char* x, size_t x_pitch, Ints (&exact)[O][R]) {
    unroll<R>([&](auto r) PT_UNROLLED {
      const auto values = load_once<Shorts>(x + r * x_pitch);
      unroll<O>([&](auto o) PT_UNROLLED {
        exact[o][r] += multiply_pairs(w[o], values);
        settle(exact[o][r]);
      });
    });
  }
  // Sums stay in memory: the registers are full with a block's integers.
  PT_UNROLLED void add(size_t output, size_t row, Floats values, Floats scale) {
    float* sum = accumulators.sums[output][row];
    store(sum, fused_multiply_add(values, scale, load<Floats>(sum)));
  }
};

struct Int8Tile : IntTile {
  using IntTile::IntTile;
  static constexpr size_t kPrefetchPieces = 2;

  static size_t row_bytes(const pt_linear_weight& weight) { return weight.in; }
  static size_t offset_bytes(size_t input) { return input; }
  void begin_piece(size_t, size_t, size_t, size_t) {}
  void end_piece(size_t, size_t) {}
  float output_scale(size_t global_output) const {
    float scale = 0;
    load_floats(weight.scale, weight.scale_dtype, global_output, &scale, 1);
    return scale;
  }

  template <size_t O, size_t R>
  PT_TILE void multiply(const char* weights, uintptr_t ahead, size_t output, size_t row, size_t begin, size_t count) {
    const size_t pitch = row_bytes(weight);
    const size_t x_pitch = operand.row_bytes;
    const char* x = codes(row, begin);
    for (size_t block = 0; block < count; block += kInt8Block) {
      const size_t end = count - block < kInt8Block ? count : block + kInt8Block;
      Ints exact[O][R];
      unroll<O>([&](auto o) PT_UNROLLED { unroll<R>([&](auto r) PT_UNROLLED { exact[o][r] = Ints{}; }); });
      if (ahead != 0) {
        unroll<O>([&](auto o) PT_UNROLLED {
          for (size_t line = 0; line < kInt8Block; line += 64) prefetch(ahead + o * pitch + block + line);
        });
      }
      for (size_t i = block; i < end; i += kShorts) {
        Shorts w[O];
        unroll<O>([&](auto o) PT_UNROLLED { w[o] = load_int8(weights + o * pitch + i); });
        multiply_codes<O, R>(w, x + i * sizeof(int16_t), x_pitch, exact);
      }
      const size_t scale_at = row * operand.block_pitch + (begin + block) / kInt8Block;
      unroll<R>([&](auto r) PT_UNROLLED {
        const Floats scale = broadcast(operand.scales[scale_at + r * operand.block_pitch]);
        unroll<O>([&](auto o) PT_UNROLLED { add(output + o, row + r, to_floats(exact[o][r]), scale); });
      });
    }
  }
};

// A vector of kBytes holds 2 * kBytes weights as 16-bit words of four: nibble n of word l is weight 4 * l + n. So a
// 32-bit lane of sums covers eight neighbouring weights, which lie in one group.
template <size_t kGroup>
struct Int4Tile : IntTile {
  using IntTile::IntTile;
  static constexpr size_t kPrefetchPieces = 2;
  static constexpr size_t kVector = 2 * kBytes;
  // What one pair of scale vectors covers.
  static constexpr size_t kUnit = kGroup > kVector ? kGroup : kVector;
  static constexpr size_t kPieceGroups = kPiece / kGroup;

  alignas(64) float scales[kTileOutputs][kPieceGroups + kLanes] = {};
  alignas(64) float offsets[kTileOutputs][kPieceGroups + kLanes] = {};

  static size_t row_bytes(const pt_linear_weight& weight) { return weight.in / 2; }
  static size_t offset_bytes(size_t input) { return input / 2; }
  float output_scale(size_t) const { return 1.0f; }

  // w = q * scale + (zero - 8 * scale): scales and offsets of this piece, zeros behind the last group.
  void begin_piece(size_t global_output, size_t num_outputs, size_t begin, size_t count) {
    piece_begin_ = begin;
    const size_t groups = weight.in / kGroup, at = global_output * groups + begin / kGroup;
    switch (static_cast<pt_linear_dtype>(weight.scale_dtype)) {
      case PT_LINEAR_X_FLOAT32:
        return widen_scales<Float32>(num_outputs, at, groups, count / kGroup);
      case PT_LINEAR_X_BFLOAT16:
        return widen_scales<Bfloat16>(num_outputs, at, groups, count / kGroup);
      case PT_LINEAR_X_FLOAT16:
        return widen_scales<Float16>(num_outputs, at, groups, count / kGroup);
    }
  }

  // The zero term: per group, offset times the sum of x.
  void end_piece(size_t num_outputs, size_t num_rows) {
    for (size_t row = 0; row < num_rows; ++row) {
      const float* sums = operand.sums + row * operand.block_pitch + piece_begin_ / kGroup;
      for (size_t o = 0; o < num_outputs; ++o) {
        Floats sum = load<Floats>(accumulators.sums[o][row]);
        for (size_t g = 0; g < kPieceGroups; g += kLanes) {
          sum = fused_multiply_add(load<Floats>(offsets[o] + g), load<Floats>(sums + g), sum);
        }
        store(accumulators.sums[o][row], sum);
      }
    }
  }

  template <size_t O, size_t R>
  PT_TILE void multiply(const char* weights, uintptr_t ahead, size_t output, size_t row, size_t begin, size_t count) {
    const size_t pitch = row_bytes(weight);
    const size_t whole = count / kUnit * kUnit;
    for (size_t i = 0; i < whole; i += kUnit) {
      if (ahead != 0) {
        for (size_t o = 0; o < O; ++o) prefetch(ahead + o * pitch + i / 2);
      }
      unit<O, R>(weights + i / 2, pitch, output, row, begin + i, i / kGroup);
    }
    if constexpr (kGroup < kVector) {
      if (whole < count) {  // a last part of a vector: only where `in` is no multiple of it
        alignas(64) char rest[O][kBytes] = {};
        for (size_t o = 0; o < O; ++o) {
          __builtin_memcpy(rest[o], weights + o * pitch + whole / 2, (count - whole) / 2);
        }
        unit<O, R>(rest[0], kBytes, output, row, begin + whole, whole / kGroup);
      }
    }
  }

 private:
  size_t piece_begin_ = 0;

  template <typename Type>
  void widen_scales(size_t num_outputs, size_t at, size_t groups, size_t here) {
    const auto* scale = static_cast<const typename Type::Storage*>(weight.scale) + at;
    const auto* zero = static_cast<const typename Type::Storage*>(weight.zero) + at;
    const auto widen = [&](size_t o, size_t g) PT_UNROLLED {
      scales[o][g] = Type::to_float(scale[o * groups + g]);
      offsets[o][g] = Type::to_float(zero[o * groups + g]) - 8.0f * scales[o][g];
    };
    for (size_t o = 0; o < num_outputs; ++o) {
      if (here == kPieceGroups) {  // a constant count for the compiler: this is a tenth of the time otherwise
        for (size_t g = 0; g < kPieceGroups; ++g) widen(o, g);
        continue;
      }
      for (size_t g = 0; g < here; ++g) widen(o, g);
      for (size_t g = here; g < kPieceGroups; ++g) scales[o][g] = offsets[o][g] = 0.0f;
    }
  }

  template <size_t O, size_t R>
  PT_UNROLLED inline void unit(const char* weights, size_t pitch, size_t output, size_t row, size_t input,
                               size_t group) {
    Ints exact[O][R];
    unroll<O>([&](auto o) PT_UNROLLED { unroll<R>([&](auto r) PT_UNROLLED { exact[o][r] = Ints{}; }); });
    const size_t x_pitch = operand.row_bytes;
    const char* x = codes(row, input);
    for (size_t vector = 0; vector < kUnit / kVector; ++vector) {
      unroll<4>([&](auto nibble) PT_UNROLLED {
        Shorts w[O];
        const char* step = weights + vector * kBytes;
        forget(step);
        unroll<O>([&](auto o) PT_UNROLLED {
          const Halves words = load<Halves>(step + o * pitch);
          w[o] = (Shorts)(words >> static_cast<uint16_t>(4 * nibble) & static_cast<uint16_t>(15));
        });
        multiply_codes<O, R>(w, x + (vector * kVector + nibble * kShorts) * sizeof(int16_t), x_pitch, exact);
      });
    }
    const size_t x_scale_at = row * operand.block_pitch + input / kGroup;
    unroll<R>([&](auto r) PT_UNROLLED {
      const Floats x_scale = spread<kGroup>(operand.scales + x_scale_at + r * operand.block_pitch);
      unroll<O>([&](auto o) PT_UNROLLED {
        const Floats w_scale = spread<kGroup>(scales[output + o] + group);
        add(output + o, row + r, to_floats(exact[o][r]) * x_scale, w_scale);
      });
    });
  }
};

}  // namespace
}  // namespace pt::linear
