/* SPDX-License-Identifier: Apache-2.0
 *
 * Products of a few rows of activations with a large weight: y[rows, out] = x[rows, in] @ w[out, in]^T (+ bias). Made
 * for decode, where reading the weights is the whole cost. C ABI, no other dependency.
 *
 * Layout: weights lie as in the checkpoint, row-major, one output after the other, without padding; nothing is packed
 * and nothing depends on the instruction set. So the same bytes can be mapped from a file and handed to a GEMM.
 *   PT_LINEAR_FLOAT32, _BFLOAT16, _FLOAT16   weight [out, in]
 *   PT_LINEAR_INT8   weight [out, in] int8, scale [out]:                    w = q * scale
 *   PT_LINEAR_INT4   weight [out, in / 2], even input in the low half of a byte, scale and zero [out, in / group_size]:
 *                    w = (q - 8) * scale + zero
 * `in` is a multiple of 32 and, for INT4, of group_size (32 or 128). `out` is any number from 1.
 *
 * Arithmetic: float32 accumulation. With integer weights, activations become 16-bit integers times a power of two per
 * 128 inputs (INT4: per group), so that sums inside a group are exact; bfloat16 values down to 1/128 of the block's
 * largest are exact, smaller ones are off by at most 2^-15 of it. Float32 activations are split into two such numbers.
 * An infinite or NaN activation gives NaN with integer weights. y is rounded once, to nearest even.
 *
 * Same bits for a row whatever the other rows, the number of rows, of threads, and the cut of the work. The
 * instruction sets differ in the last bits of float32 (order of the sum, fused multiply-add).
 *
 * Functions return PT_LINEAR_OK or a status; the text is in pt_linear_last_error() of the calling thread. No function
 * throws. Any thread may call; calls with threads > 1 take turns on one pool of threads.
 */
#ifndef PT_LINEAR_H_
#define PT_LINEAR_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
#define PT_LINEAR_NOEXCEPT noexcept
extern "C" {
#else
#define PT_LINEAR_NOEXCEPT
#endif

#define PT_LINEAR_API __attribute__((visibility("default")))
#define PT_LINEAR_ABI_VERSION 1

/* The numbers are those of pt_status. */
typedef enum pt_linear_status {
  PT_LINEAR_OK = 0,
  PT_LINEAR_INVALID_ARGUMENT = 1,
  PT_LINEAR_SYSTEM_ERROR = 6, /* no memory, no thread */
  PT_LINEAR_UNSUPPORTED = 7   /* PT_KERNELS_ISA asks for what this build or processor lacks */
} pt_linear_status;

/* Types of x, y, bias, scale and zero; the numbers are those of pt_dtype. */
typedef enum pt_linear_dtype {
  PT_LINEAR_X_FLOAT32 = 0,
  PT_LINEAR_X_BFLOAT16 = 1,
  PT_LINEAR_X_FLOAT16 = 2
} pt_linear_dtype;

typedef enum pt_linear_kind {
  PT_LINEAR_FLOAT32 = 0,
  PT_LINEAR_BFLOAT16 = 1,
  PT_LINEAR_FLOAT16 = 2,
  PT_LINEAR_INT8 = 3,
  PT_LINEAR_INT4 = 4
} pt_linear_kind;

typedef struct pt_linear_weight {
  const void* weight;
  const void* scale; /* INT8, INT4; null otherwise */
  const void* zero;  /* INT4; null otherwise */
  size_t out, in;
  size_t group_size; /* INT4: 32 or 128; 0 otherwise */
  int32_t kind;
  int32_t scale_dtype; /* of scale and zero */
} pt_linear_weight;

PT_LINEAR_API const char* pt_linear_last_error(void) PT_LINEAR_NOEXCEPT;
PT_LINEAR_API int pt_linear_abi_version(void) PT_LINEAR_NOEXCEPT;
/* "baseline", "avx2" or "avx512"; null with an error text when PT_KERNELS_ISA cannot be met. */
PT_LINEAR_API const char* pt_linear_isa(void) PT_LINEAR_NOEXCEPT;

/* x [rows, in] and y [rows, out] of `dtype`, dense, not overlapping; bias [out] of `dtype` or null. `threads`: 1 runs
 * on the caller alone, more adds threads of a pool that lives on. Any number of rows works; weights are read once per
 * 16 rows (8 with integer weights and float32 activations), so that a GEMM wins from a few dozen rows on. */
PT_LINEAR_API int pt_linear_forward(const pt_linear_weight* weight, const void* x, const void* bias, void* y,
                                    size_t rows, int dtype, int threads) PT_LINEAR_NOEXCEPT;

/* y = silu(x @ gate^T) * (x @ up^T), all in float32, rounded once. gate and up share kind, sizes and group size. */
PT_LINEAR_API int pt_linear_swiglu(const pt_linear_weight* gate, const pt_linear_weight* up, const void* x, void* y,
                                   size_t rows, int dtype, int threads) PT_LINEAR_NOEXCEPT;

/* Weights of outputs first <= o < last as [last - first, in] of `dtype`: feeds a GEMM tile by tile, without a second
 * copy of the weights. One thread. */
PT_LINEAR_API int pt_linear_dequantize(const pt_linear_weight* weight, size_t first, size_t last, int dtype,
                                       void* out) PT_LINEAR_NOEXCEPT;

/* Zeroed memory at a multiple of 2 MiB, in huge pages where the system grants them; weights read from it stream faster
 * than from a mapped file. Freed with the same size. */
PT_LINEAR_API int pt_linear_huge_alloc(size_t bytes, void** memory) PT_LINEAR_NOEXCEPT;
PT_LINEAR_API void pt_linear_huge_free(void* memory, size_t bytes) PT_LINEAR_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_LINEAR_H_ */
