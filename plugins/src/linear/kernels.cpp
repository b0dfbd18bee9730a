// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set with PT_KERNELS_ISA = baseline, avx2 or avx512 and -ffp-contract=off.
#include "linear/kernels.h"

#include "linear/float_tile.h"
#include "linear/int_tile.h"
#include "linear/operand.h"

#define PT_STRING_OF(text) #text
#define PT_STRING(text) PT_STRING_OF(text)

namespace pt::linear::PT_KERNELS_ISA {
namespace {

size_t operand_bytes(const pt_linear_weight* weight, size_t rows) {
  return Operand(*weight, rows, nullptr).bytes(rows);
}

void prepare(const pt_linear_weight* weight, const void* x, int dtype, size_t rows, size_t terms, void* memory) {
  const Operand operand(*weight, rows * terms, memory);
  for (size_t row = 0; row < rows; ++row) {
    if (is_integer(*weight)) {
      prepare_integer_row(*weight, x, dtype, row * weight->in, operand, row * terms, terms);
    } else {
      prepare_float_row(*weight, x, dtype, row * weight->in,
                        reinterpret_cast<float*>(operand.rows + row * operand.row_bytes));
    }
  }
}

// R rows against all outputs of one piece: the rows stay in the first-level cache while the weights pass.
template <size_t O, size_t R, typename Tile>
void multiply_rows(Tile& tile, const char* weights, uintptr_t ahead, size_t row, size_t num_outputs, size_t begin,
                   size_t count) {
  const size_t pitch = Tile::row_bytes(tile.weight);
  const auto ahead_of = [&](size_t output) { return ahead == 0 ? 0 : ahead + output * pitch; };
  size_t output = 0;
  for (; output + O <= num_outputs; output += O) {
    tile.template multiply<O, R>(weights + output * pitch, ahead_of(output), output, row, begin, count);
  }
  for (; output < num_outputs; ++output) {
    tile.template multiply<1, R>(weights + output * pitch, ahead_of(output), output, row, begin, count);
  }
}

// All rows, in groups of at most kRows; only the first group fetches ahead.
template <size_t O, size_t kRows, typename Tile>
void multiply_piece(Tile& tile, const char* weights, uintptr_t ahead, size_t rows, size_t num_outputs, size_t begin,
                    size_t count) {
  static_assert(kRows == 2 || kRows == 4);
  size_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_rows<O, kRows>(tile, weights, row == 0 ? ahead : 0, row, num_outputs, begin, count);
  }
  const uintptr_t rest_ahead = row == 0 ? ahead : 0;
  if constexpr (kRows == 4) {
    if (rows - row == 3) multiply_rows<O, 3>(tile, weights, rest_ahead, row, num_outputs, begin, count);
    if (rows - row == 2) multiply_rows<O, 2>(tile, weights, rest_ahead, row, num_outputs, begin, count);
  }
  if (rows - row == 1) multiply_rows<O, 1>(tile, weights, rest_ahead, row, num_outputs, begin, count);
}

template <typename Tile>
void multiply_outputs(const pt_linear_weight& weight, const Operand& operand, size_t rows, size_t first, size_t last,
                      float* out, size_t stride) {
  Accumulators accumulators;
  Tile tile(weight, operand, accumulators);
  const char* weights = static_cast<const char*>(weight.weight);
  const size_t pitch = Tile::row_bytes(weight), pieces = (weight.in + kPiece - 1) / kPiece;
  // Few rows need no reuse of x, and fewer streams at a time run faster.
  const size_t tile_outputs = rows <= Tile::kFewRows ? Tile::kFewRowsOutputs : kTileOutputs;
  const size_t prefetch_pieces = Tile::kPrefetchPieces * (kTileOutputs / tile_outputs);
  for (size_t output = first; output < last; output += tile_outputs) {
    const size_t num_outputs = last - output < tile_outputs ? last - output : tile_outputs;
    for (size_t o = 0; o < num_outputs; ++o) {
      for (size_t row = 0; row < rows; ++row) store(accumulators.sums[o][row], Floats{});
    }
    for (size_t piece = 0; piece < pieces; ++piece) {
      const size_t begin = piece * kPiece, count = weight.in - begin < kPiece ? weight.in - begin : kPiece;
      const size_t next = piece + prefetch_pieces;
      // May lie behind the weights: a prefetch does not fault.
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(weights) + (output + next / pieces * tile_outputs) * pitch +
                              Tile::offset_bytes(next % pieces * kPiece);
      const char* here = weights + output * pitch + Tile::offset_bytes(begin);
      tile.begin_piece(output, num_outputs, begin, count);
      if (rows <= Tile::kFewRows) {
        multiply_piece<Tile::kFewRowsOutputs, Tile::kFewRows>(tile, here, ahead, rows, num_outputs, begin, count);
      } else {
        multiply_piece<Tile::kManyRowsOutputs, Tile::kManyRows>(tile, here, ahead, rows, num_outputs, begin, count);
      }
      tile.end_piece(num_outputs, rows);
    }
    for (size_t o = 0; o < num_outputs; ++o) {
      const float scale = tile.output_scale(output + o);
      for (size_t row = 0; row < rows; ++row) {
        out[row * stride + output - first + o] = fold(load<Floats>(accumulators.sums[o][row])) * scale;
      }
    }
  }
}

void multiply(const pt_linear_weight* weight, const void* memory, size_t rows, size_t first, size_t last, float* out,
              size_t stride) {
  const Operand operand(*weight, rows, const_cast<void*>(memory));
  switch (static_cast<pt_linear_kind>(weight->kind)) {
    case PT_LINEAR_FLOAT32:
      return multiply_outputs<FloatTile<Float32Weights>>(*weight, operand, rows, first, last, out, stride);
    case PT_LINEAR_BFLOAT16:
      return multiply_outputs<FloatTile<Bfloat16Weights>>(*weight, operand, rows, first, last, out, stride);
    case PT_LINEAR_FLOAT16:
      return multiply_outputs<FloatTile<Float16Weights>>(*weight, operand, rows, first, last, out, stride);
    case PT_LINEAR_INT8:
      return multiply_outputs<Int8Tile>(*weight, operand, rows, first, last, out, stride);
    case PT_LINEAR_INT4:
      if (weight->group_size == 32) {
        return multiply_outputs<Int4Tile<32>>(*weight, operand, rows, first, last, out, stride);
      }
      return multiply_outputs<Int4Tile<128>>(*weight, operand, rows, first, last, out, stride);
  }
}

void weights_as_floats(const pt_linear_weight& weight, size_t output, size_t begin, float* values, size_t count) {
  const size_t at = output * weight.in + begin;
  float scale = 1.0f, zero = 0.0f;
  if (weight.kind == PT_LINEAR_INT8) {
    load_floats(weight.scale, weight.scale_dtype, output, &scale, 1);
    const auto* codes = static_cast<const int8_t*>(weight.weight) + at;
    for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(codes[i]) * scale;
  } else if (weight.kind == PT_LINEAR_INT4) {
    const auto* bytes = static_cast<const uint8_t*>(weight.weight) + at / 2;
    for (size_t i = 0; i < count; i += weight.group_size) {
      load_floats(weight.scale, weight.scale_dtype, (at + i) / weight.group_size, &scale, 1);
      load_floats(weight.zero, weight.scale_dtype, (at + i) / weight.group_size, &zero, 1);
      for (size_t j = i / 2; j < (i + weight.group_size) / 2; ++j) {
        values[2 * j] = static_cast<float>((bytes[j] & 15) - 8) * scale + zero;
        values[2 * j + 1] = static_cast<float>((bytes[j] >> 4) - 8) * scale + zero;
      }
    }
  } else {
    load_floats(weight.weight, weight.kind, at, values, count);  // float kinds are numbered like dtypes
  }
}

void dequantize(const pt_linear_weight* weight, size_t first, size_t last, int dtype, void* out) {
  using namespace numeric;
  alignas(64) float values[kPiece];
  for (size_t output = first; output < last; ++output) {
    for (size_t begin = 0; begin < weight->in; begin += kPiece) {
      const size_t count = weight->in - begin < kPiece ? weight->in - begin : kPiece;
      const size_t at = (output - first) * weight->in + begin;
      weights_as_floats(*weight, output, begin, values, count);
      switch (static_cast<pt_linear_dtype>(dtype)) {
        case PT_LINEAR_X_FLOAT32:
          store_tile<Float32>(values, static_cast<AnyFloat*>(out) + at, count);
          break;
        case PT_LINEAR_X_BFLOAT16:
          store_tile<Bfloat16>(values, static_cast<AnyHalf*>(out) + at, count);
          break;
        case PT_LINEAR_X_FLOAT16:
          store_tile<Float16>(values, static_cast<AnyHalf*>(out) + at, count);
          break;
      }
    }
  }
}

}  // namespace

const Kernels kKernels = {PT_STRING(PT_KERNELS_ISA), operand_bytes, prepare, multiply, dequantize};

}  // namespace pt::linear::PT_KERNELS_ISA
