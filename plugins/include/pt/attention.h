/* SPDX-License-Identifier: Apache-2.0
 *
 * Ragged paged attention on the CPU, and the small kernels around it. C ABI: plain pointers, sizes and strides.
 *
 * A step is a packed batch: the new tokens of several sequences laid end to end, decode and (chunked) prefill mixed.
 * Tensors of activations are [tracks, tokens, features] with strides in elements, so that slices of a fused projection
 * are used in place; the features of one token are contiguous.
 *
 * Every function returns PT_OK or a pt_status; the text is in pt_attention_last_error() of the calling thread. Nothing
 * throws. Arguments are checked before anything is written. Calls may come from several threads at once as long as
 * they write to different memory.
 *
 * The result of a token depends on its query and on the keys and values it sees, and on nothing else: not on the other
 * sequences of the batch, not on how a prompt was cut into chunks, not on the number of threads; bit by bit. Other
 * instruction sets (PT_KERNELS_ISA=baseline|avx2|avx512) give other last bits.
 */
#ifndef PT_ATTENTION_H_
#define PT_ATTENTION_H_

#include "pt/track_fusion.h" /* pt_status, pt_dtype, PT_API */

#if defined(__cplusplus)
extern "C" {
#endif

#define PT_ATTENTION_ABI_VERSION 2
#define PT_ATTENTION_MAX_HEAD_DIM 256
#define PT_ATTENTION_MAX_THREADS 64
/* Type of keys and values beside those of pt_dtype: one float32 scale per block, track, head and token. */
#define PT_KV_INT8 3

/* The keys and values of one layer.
 *   keys    [num_blocks, num_tracks, num_kv_heads, head_dim, block_tokens]   transposed: see the README
 *   values  [num_blocks, num_tracks, num_kv_heads, block_tokens, head_dim]
 *   scales  [num_blocks, num_tracks, num_kv_heads, block_tokens] float32, null unless dtype is PT_KV_INT8
 * block_tokens and head_dim are multiples of 16. */
typedef struct pt_paged_kv {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int32_t num_blocks;
  int32_t num_tracks;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_tokens;
  int32_t dtype;
} pt_paged_kv;

/* Sequence s owns tokens first_token[s] .. first_token[s] + num_tokens[s] - 1 of the step, at positions past[s] and up.
 * Position p is in block block_table[s * table_stride + p / block_tokens]. Blocks that lie before every window are
 * never looked at: their entries may be -1. */
typedef struct pt_ragged_batch {
  const int32_t* first_token;
  const int32_t* num_tokens;
  const int32_t* past;
  const int32_t* block_table;
  int64_t table_stride;
  int32_t num_sequences;
  int32_t max_blocks;
  int32_t total_tokens;
} pt_ragged_batch;

/* [tracks, tokens, features]; strides in elements, features contiguous. */
typedef struct pt_rows {
  void* data;
  int64_t track_stride;
  int64_t token_stride;
  int32_t dtype;
} pt_rows;

PT_API const char* pt_attention_last_error(void) PT_NOEXCEPT;
PT_API int pt_attention_abi_version(void) PT_NOEXCEPT;
/* "baseline", "avx2" or "avx512"; null when PT_KERNELS_ISA names one that is unknown or cannot run here. */
PT_API const char* pt_attention_isa(void) PT_NOEXCEPT;

/* Stores the new keys and values [tracks, tokens, kv_heads * head_dim]. No two sequences may write to one block. int8:
 * scale = max |x| / 127 over a head of a token, values rounded to nearest even. */
PT_API int pt_attention_write(const pt_paged_kv* cache, const pt_ragged_batch* batch, const pt_rows* key,
                              const pt_rows* value, int num_threads) PT_NOEXCEPT;

/* query, out: [tracks, tokens, num_heads * head_dim]; query head h reads key head h / (num_heads / num_kv_heads). A
 * token at position p sees positions max(0, p - window) .. p; window -1 sees all. The new keys must have been written.
 * Scores, softmax and sums are float32. out overlaps neither query nor cache. */
PT_API int pt_attention_attend(const pt_paged_kv* cache, const pt_ragged_batch* batch, const pt_rows* query,
                               int num_heads, int64_t window, float scale, const pt_rows* out,
                               int num_threads) PT_NOEXCEPT;

/* out = x / rms(x) * weight per track, in float32, rounded once; pre_scale: y = x * weight, out = y / rms(y). weight:
 * null or [tracks, width] of weight_dtype (x's or PT_FLOAT32), weight_track_stride may be 0. out may be x. */
PT_API int pt_rms_norm(const pt_rows* x, const pt_rows* out, int num_tracks, int num_tokens, int width,
                       const void* weight, int weight_dtype, int64_t weight_track_stride, float eps,
                       int pre_scale) PT_NOEXCEPT;

typedef enum pt_qk_norm { PT_QK_NORM_NONE = 0, PT_QK_NORM_BEFORE_ROPE = 1, PT_QK_NORM_AFTER_ROPE = 2 } pt_qk_norm;
typedef enum pt_rope { PT_ROPE_NONE = 0, PT_ROPE_INTERLEAVED = 1, PT_ROPE_HALF = 2 } pt_rope;

/* Per-head RMSNorm and rotation of queries and keys, in place on qkv [tracks, tokens, (heads + 2 * kv_heads) * dim];
 * rounded to qkv's type after each of the two, as two separate operations would. Weights: null or [tracks, head_dim].
 * cos, sin: float32 [rows, head_dim / 2]; token i takes row positions[i] < num_rows, or row i without positions. */
typedef struct pt_qk_prologue {
  const void* query_weight;
  const void* key_weight;
  const float* cos;
  const float* sin;
  const int64_t* positions;
  int64_t query_weight_track_stride;
  int64_t key_weight_track_stride;
  int64_t num_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t weight_dtype;
  int32_t norm; /* pt_qk_norm */
  int32_t rope; /* pt_rope */
  float eps;
} pt_qk_prologue;

PT_API int pt_qk_norm_rope(const pt_rows* qkv, int num_tracks, int num_tokens, const pt_qk_prologue* work) PT_NOEXCEPT;

/* out = x + y [tracks, tokens, width], all of one type. out may be x or y. */
PT_API int pt_add(const pt_rows* x, const pt_rows* y, const pt_rows* out, int num_tracks, int num_tokens,
                  int width) PT_NOEXCEPT;

/* out [tracks, tokens, width] = silu(gate) * up of x [tracks, tokens, 2 * width]; silu is rounded to x's type, as two
 * separate operations would. gate_first: the gate is the first half of x, otherwise the second. */
PT_API int pt_swiglu(const pt_rows* x, const pt_rows* out, int num_tracks, int num_tokens, int width,
                     int gate_first) PT_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_ATTENTION_H_ */
