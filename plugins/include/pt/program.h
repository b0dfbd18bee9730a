/* SPDX-License-Identifier: Apache-2.0
 *
 * Programs: the operations of a forward pass between two collectives as a list, run in one call. Everything that does
 * not change from step to step (weights, buffers, shapes) is bound once; a step brings its tokens. C ABI.
 *
 * Activations are [tracks, tokens, width] in buffers with room for the longest step: the distance of two tracks is
 * fixed, the number of tokens is the step's. Operations run in order and may use each other's results. An operation
 * means what its function in pt/linear.h or pt/attention.h says; pt_program_run checks its own fields and leaves the
 * rest to them.
 */
#ifndef PT_PROGRAM_H_
#define PT_PROGRAM_H_

#include "pt/attention.h"
#include "pt/linear.h"

#if defined(__cplusplus)
extern "C" {
#endif

#define PT_PROGRAM_ABI_VERSION 2

typedef enum pt_program_kind {
  PT_PROGRAM_EMBED = 0,
  PT_PROGRAM_LINEAR = 1,
  PT_PROGRAM_RMS_NORM = 2,
  PT_PROGRAM_ADD = 3,
  PT_PROGRAM_QK_NORM_ROPE = 4,
  PT_PROGRAM_ATTEND = 5
} pt_program_kind;
#define PT_PROGRAM_KINDS 6

/* out[token] = table[token_ids[token]]; rows are dense on both sides. */
typedef struct pt_program_embed {
  const void* table;
  void* out;
  int64_t num_rows;
  size_t row_bytes;
} pt_program_embed;

/* One track: pt_linear_swiglu with `up`, pt_linear_forward (and the bias) without. */
typedef struct pt_program_linear {
  const pt_linear_weight* weight;
  const pt_linear_weight* up;
  const void* x;
  const void* bias;
  void* y;
  int32_t dtype;
} pt_program_linear;

typedef struct pt_program_rms_norm {
  pt_rows x;
  pt_rows out;
  const void* weight;
  int64_t weight_track_stride;
  int32_t num_tracks;
  int32_t width;
  int32_t weight_dtype;
  int32_t pre_scale;
  float eps;
} pt_program_rms_norm;

typedef struct pt_program_add {
  pt_rows x;
  pt_rows y;
  pt_rows out;
  int32_t num_tracks;
  int32_t width;
} pt_program_add;

/* work.positions is not used: tokens are at the step's positions. */
typedef struct pt_program_qk_norm_rope {
  pt_rows qkv;
  pt_qk_prologue work;
  int32_t num_tracks;
} pt_program_qk_norm_rope;

/* pt_attention_write, then pt_attention_attend. */
typedef struct pt_program_attend {
  const pt_paged_kv* cache;
  pt_rows query;
  pt_rows key;
  pt_rows value;
  pt_rows out;
  int64_t window;
  int32_t num_heads;
  float scale;
  int32_t batch; /* which of the step's batches */
} pt_program_attend;

typedef struct pt_program_op {
  int32_t kind;     /* pt_program_kind */
  const void* work; /* the struct of that kind */
} pt_program_op;

typedef struct pt_program_step {
  const int64_t* token_ids; /* [total_tokens of a batch] */
  /* [num_batches], at least one: the same tokens, each with the block tables of the layers that see equally far. */
  const pt_ragged_batch* const* batches;
  int32_t num_batches;
  int32_t num_threads;
} pt_program_step;

PT_API const char* pt_program_last_error(void) PT_NOEXCEPT;
PT_API int pt_program_abi_version(void) PT_NOEXCEPT;

/* Runs the operations. Adds the seconds spent in each kind to seconds[PT_PROGRAM_KINDS]. */
PT_API int pt_program_run(const pt_program_op* ops, size_t num_ops, const pt_program_step* step,
                          double* seconds) PT_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_PROGRAM_H_ */
