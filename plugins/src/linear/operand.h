// SPDX-License-Identifier: Apache-2.0
// Activations in the order and type in which the loops read them.
#pragma once

#include "linear/kernels.h"
#include "linear/simd.h"

namespace pt::linear {
namespace {

using numeric::Bfloat16;
using numeric::bits_of;
using numeric::Float16;
using numeric::Float32;
using numeric::float_of;

// Inputs that pass through the first-level cache together. Part of the order of sums: the same for all row counts.
constexpr size_t kPiece = 1024;
constexpr size_t kInt8Block = 128;

inline bool is_integer(const pt_linear_weight& weight) { return weight.kind >= PT_LINEAR_INT8; }
inline size_t block_size(const pt_linear_weight& weight) {
  return weight.kind == PT_LINEAR_INT4 ? weight.group_size : kInt8Block;
}
inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows are an odd multiple of 64 bytes and about 1 KiB apart modulo a page, so that those of one piece fall into
// different sets of the cache.
inline size_t staggered_bytes(size_t bytes) { return round_up(bytes, 4096) + 1088; }

// Float weights: rows of float. Integer weights: rows of 16-bit codes, then per row and block the scale, then (for the
// zeros) the sum of the block's values. Blocks are padded with zeros to a whole vector.
struct Operand {
  char* rows;
  size_t row_bytes;
  float* scales;
  float* sums;
  size_t block_pitch;

  Operand(const pt_linear_weight& weight, size_t num_rows, void* memory) {
    const size_t element = is_integer(weight) ? 2 : 4;
    row_bytes = staggered_bytes(round_up(weight.in, 2 * kBytes) * element);
    // Loops over the blocks of a piece, and vectors that reach over its end, read zeros behind the last block.
    block_pitch = is_integer(weight) ? round_up(round_up(weight.in, kPiece) / block_size(weight) + kLanes, kLanes) : 0;
    rows = static_cast<char*>(memory);
    scales = reinterpret_cast<float*>(rows + num_rows * row_bytes);
    sums = scales + num_rows * block_pitch;
  }
  size_t bytes(size_t num_rows) const { return num_rows * (row_bytes + 2 * block_pitch * sizeof(float)); }
};

inline void load_floats(const void* source, int dtype, size_t offset, float* values, size_t count) {
  using namespace numeric;
  switch (static_cast<pt_linear_dtype>(dtype)) {
    case PT_LINEAR_X_FLOAT32:
      return load_tile<Float32>(static_cast<const AnyFloat*>(source) + offset, values, count);
    case PT_LINEAR_X_BFLOAT16:
      return load_tile<Bfloat16>(static_cast<const AnyHalf*>(source) + offset, values, count);
    case PT_LINEAR_X_FLOAT16:
      return load_tile<Float16>(static_cast<const AnyHalf*>(source) + offset, values, count);
  }
}

// bfloat16 weights come out of a register as even and odd elements, so x goes in that way.
inline void split_even_odd(const float* values, float* row, size_t count) {
  for (size_t i = 0; i < count; i += 2 * kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      row[i + lane] = values[i + 2 * lane];
      row[i + kLanes + lane] = values[i + 2 * lane + 1];
    }
  }
}

// int4 weights come out as every fourth element, four times; see int_tile.h.
inline void split_by_nibble(const int16_t* codes, int16_t* row, size_t count) {
  for (size_t i = 0; i < count; i += 4 * kShorts) {
    for (size_t nibble = 0; nibble < 4; ++nibble) {
      for (size_t lane = 0; lane < kShorts; ++lane) {
        row[i + nibble * kShorts + lane] = codes[i + 4 * lane + nibble];
      }
    }
  }
}

// values -> codes * scale, the scale a power of two; leaves in `values` what the codes miss. Sum of the codes' values
// in *sum. A block with NaN or infinity gets the scale NaN.
inline void quantize_block(float* values, size_t count, int16_t* codes, float* scale, float* sum) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  uint32_t exponent = largest >> 23;
  if (exponent == 255) {
    for (size_t i = 0; i < count; ++i) codes[i] = 0;
    for (size_t i = 0; i < count; ++i) values[i] = 0.0f;
    *scale = *sum = float_of(numeric::kQuietNan);
    return;
  }
  // Keeps scale and its inverse normal numbers; blocks below 2^-112 lose digits.
  if (exponent < 15) exponent = 15;
  const float step = float_of((exponent - 14) << 23);
  const float inverse = float_of((268 - exponent) << 23);
  int32_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const int32_t nearest = static_cast<int32_t>(bits_of(values[i] * inverse + 12582912.0f)) - 0x4B400000;
    const int32_t code = nearest > 32767 ? 32767 : nearest < -32767 ? -32767 : nearest;
    codes[i] = static_cast<int16_t>(code);
    values[i] -= static_cast<float>(code) * step;
    total += code;
  }
  *scale = step;
  *sum = static_cast<float>(total) * step;
}

inline void prepare_float_row(const pt_linear_weight& weight, const void* x, int dtype, size_t offset, float* row) {
  alignas(64) float values[kPiece];
  for (size_t done = 0; done < weight.in; done += kPiece) {
    const size_t count = weight.in - done < kPiece ? weight.in - done : kPiece;
    if (weight.kind == PT_LINEAR_BFLOAT16) {
      load_floats(x, dtype, offset + done, values, count);
      split_even_odd(values, row + done, count);
    } else {
      load_floats(x, dtype, offset + done, row + done, count);
    }
  }
}

// `terms` operand rows from one row of x, starting at operand row `first`.
inline void prepare_integer_row(const pt_linear_weight& weight, const void* x, int dtype, size_t offset,
                                const Operand& operand, size_t first, size_t terms) {
  alignas(64) float values[kPiece];
  alignas(64) int16_t codes[kPiece];
  const size_t block = block_size(weight), num_blocks = operand.block_pitch;
  for (size_t term = 0; term < terms; ++term) {
    for (size_t i = 0; i < num_blocks; ++i) {
      operand.scales[(first + term) * num_blocks + i] = operand.sums[(first + term) * num_blocks + i] = 0.0f;
    }
  }
  for (size_t done = 0; done < weight.in; done += kPiece) {
    const size_t count = weight.in - done < kPiece ? weight.in - done : kPiece;
    load_floats(x, dtype, offset + done, values, count);
    for (size_t term = 0; term < terms; ++term) {
      float* scales = operand.scales + (first + term) * num_blocks + done / block;
      float* sums = operand.sums + (first + term) * num_blocks + done / block;
      for (size_t i = 0; i < count; i += block) {
        const size_t width = count - i < block ? count - i : block;
        quantize_block(values + i, width, codes + i, scales + i / block, sums + i / block);
      }
      auto* row = reinterpret_cast<int16_t*>(operand.rows + (first + term) * operand.row_bytes) + done;
      if (weight.kind == PT_LINEAR_INT4) {
        for (size_t i = count; i < round_up(count, 4 * kShorts); ++i) codes[i] = 0;
        split_by_nibble(codes, row, round_up(count, 4 * kShorts));
      } else {
        for (size_t i = 0; i < count; ++i) row[i] = codes[i];
      }
    }
  }
}

}  // namespace
}  // namespace pt::linear
