// SPDX-License-Identifier: Apache-2.0
// The hot loops as plain functions. Included by sources that are compiled for other instruction sets: no inline
// function and no standard header with code may come in here, or the linker could keep an AVX copy of it for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "pt/attention.h"

namespace pt::attention {

constexpr int kTileKeys = 64;      // keys of one online-softmax update, aligned to positions
constexpr int kGroupKeys = 16;     // keys that are scored together; what block_tokens is a multiple of
constexpr int kMaxLanes = 16;      // floats of the widest register
constexpr int kMaxRowsAtOnce = 6;  // query rows that share the registers of one loop

// Scratch of AttendTask, per row: query, running output, lanes of sums, maximum, scores of a tile, factor.
#define PT_ATTENTION_ROW_FLOATS(head_dim) (2 * (head_dim) + kMaxLanes + 1 + kTileKeys + 1)

// A run of one sequence's new tokens against one key head of one track: rows = num_tokens * group query rows.
struct AttendTask {
  const void* keys;  // of this track and head in block 0
  const void* values;
  const float* key_scales;
  const float* value_scales;
  size_t block_stride;  // elements from one block to the next
  size_t scale_block_stride;
  const int32_t* table;
  int64_t block_tokens;
  int64_t head_dim;
  const void* query;  // first token, first head of the group; heads are head_dim apart
  void* out;
  int64_t query_token_stride;
  int64_t out_token_stride;
  int query_dtype;
  int out_dtype;
  int64_t group;
  int64_t num_tokens;
  int64_t position;  // of the first token
  int64_t window;    // never negative
  float scale;
  float* scratch;  // PT_ATTENTION_ROW_FLOATS(head_dim) per query row
};

// The new keys and values of one sequence, one track, one key head.
struct WriteTask {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  size_t block_stride;
  size_t scale_block_stride;
  const int32_t* table;
  int64_t block_tokens;
  int64_t head_dim;
  const void* key;
  const void* value;
  int64_t key_token_stride;
  int64_t value_token_stride;
  int64_t num_tokens;
  int64_t position;
};

typedef void (*AttendKernel)(const AttendTask& task);
typedef void (*WriteKernel)(const WriteTask& task);

// Tables are indexed by pt_dtype, for caches also by PT_KV_INT8. Addresses only, known when linking: code that filled a
// table at load time would run on every processor.
struct Kernels {
  const char* name;
  const AttendKernel* attend;     // [cache]
  const WriteKernel (*write)[4];  // [activations][cache]
  // [activations][weight is float32]; one token.
  void (*rms_norm[3][2])(const void* x, const void* weight, void* out, size_t width, float eps, bool pre_scale);
  void (*rope[3])(void* head, const float* cos, const float* sin, size_t head_dim, bool interleaved);
  void (*add[3])(const void* x, const void* y, void* out, size_t width);
  void (*swiglu[3])(const void* gate, const void* up, void* out, size_t width);
};

// The table for this machine, or the one PT_KERNELS_ISA names. Throws when that one is unknown or cannot run here.
const Kernels& select_kernels();
const Kernels* kernels_named(const char* name);  // null: unknown, or cannot run here

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace pt::attention
