// SPDX-License-Identifier: Apache-2.0
// The hot loops as plain functions. Included by sources that are compiled for other instruction sets: no inline
// function and no standard header with code may come in here, or the linker could keep an AVX copy of it for everybody.
#pragma once

#include <stddef.h>

#include "pt/linear.h"

namespace pt::linear {

// Rows of activations one pass over the weights serves.
constexpr size_t kMaxOperandRows = 16;
// Outputs that are accumulated together; work is best cut at multiples of it.
constexpr size_t kTileOutputs = 12;

struct Kernels {
  const char* name;
  // Bytes of the operand that `prepare` writes.
  size_t (*operand_bytes)(const pt_linear_weight* weight, size_t rows);
  // Brings x [rows, in] of `dtype` into the order and type the loops read. With `terms` = 2 (integer weights, float32
  // activations) every row becomes two operand rows whose products are added.
  void (*prepare)(const pt_linear_weight* weight, const void* x, int dtype, size_t rows, size_t terms, void* operand);
  // out[row * stride + o - first] = float32 product for outputs first <= o < last and operand rows.
  void (*multiply)(const pt_linear_weight* weight, const void* operand, size_t rows, size_t first, size_t last,
                   float* out, size_t stride);
  // Weights of outputs first <= o < last as [last - first, in] of `dtype`.
  void (*dequantize)(const pt_linear_weight* weight, size_t first, size_t last, int dtype, void* out);
};

// The table for this machine, or the one PT_KERNELS_ISA names. Throws when that one is unknown or cannot run here.
const Kernels& select_kernels();

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace pt::linear
