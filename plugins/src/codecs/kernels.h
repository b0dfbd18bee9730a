// SPDX-License-Identifier: Apache-2.0
// The hot loops over groups, as plain functions over plain pointers. Included by sources that are compiled for other
// instruction sets: see track_fusion/kernels.h for what may not come in here.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pt::codecs {

// A run of groups of one matrix [rows, hidden]: those with index first, first + 1, ... in the order of rows.
struct GroupRange {
  size_t hidden;
  size_t first;
  size_t count;
};

// Codes and scales of the groups of a range; addresses need no alignment.
struct Encoded {
  uint8_t* codes;
  uint8_t* scales;
};

struct ConstEncoded {
  const uint8_t* codes;
  const uint8_t* scales;
};

// What one codec does; tables are indexed by pt_dtype. x, base, residual and out are whole matrices.
struct CodecKernels {
  // target = x, or x - base when base is not null
  void (*encode[3])(const void* x, const void* base, GroupRange range, Encoded target);
  // out = round(scale * sum over sources of their values (+ residual)); residual may be null
  void (*reduce[3])(const ConstEncoded* sources, int size, const void* residual, float scale, void* out,
                    GroupRange range);
  // target = scale * sum over sources, encoded again
  void (*reduce_encode)(const ConstEncoded* sources, int size, float scale, size_t count, Encoded target);
  size_t group;
  size_t code_bytes;
  size_t scale_bytes;
};

struct Kernels {
  const char* name;
  CodecKernels codecs[4];  // indexed by pt_codec - 1
};

// The table of an instruction set that track_fusion::select_kernels() has chosen.
const Kernels& kernels_named(const char* isa);

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace pt::codecs
