// SPDX-License-Identifier: Apache-2.0
// The hot loops, as plain functions over plain pointers of any alignment. Included by sources that are compiled for
// other instruction sets: no inline function and no standard header with code may come in here, or the linker could
// keep an AVX copy of it for everybody.
#pragma once

#include <stddef.h>

namespace pt::track_fusion {

// Tables are indexed by pt_dtype. Rules of arithmetic: pt/track_fusion.h.
struct Kernels {
  const char* name;
  // out[i] = round(scale * sum over ranks of sources[r][i] (+ residual[i])); residual may be null.
  void (*reduce[3])(const void* const* sources, int size, const void* residual, float scale, void* out, size_t count);
  // out[i] = scale * sum, not rounded: what a slice owner hands on when a residual is still to be added.
  void (*reduce_to_float[3])(const void* const* sources, int size, float scale, float* out, size_t count);
  // out[i] = round(residual[i] + mean[i])
  void (*add_residual[3])(const float* mean, const void* residual, void* out, size_t count);
  // For every row of h [rows, hidden] and every gamma row g: out[g * gamma_stride_out + row] = normed row.
  // [dtype][gamma is float32]; strides in elements.
  void (*rms_norm[3][2])(const void* h, const void* gamma, size_t num_gammas, float eps, void* out,
                         size_t out_gamma_stride, size_t rows, size_t hidden);
};

// The table for this machine, or the one PT_TRACK_FUSION_ISA names. Throws when that one is unknown or cannot run here.
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

}  // namespace pt::track_fusion
