/* SPDX-License-Identifier: Apache-2.0
 *
 * Codecs: block-quantised payloads of track fusion. C ABI; the formats byte by byte are in src/codecs/README.md.
 *
 * A matrix [rows, hidden] is cut into groups along each row; a row ends its last group, which is filled up with zeros.
 * A group has one scale. Encoded: the codes of all groups, then the scales of all groups, filled up with zero bytes to
 * a multiple of 16. A row's codes and scales depend on that row alone.
 *
 * The same values give the same bytes and the same bytes give the same values on every processor and instruction set.
 */
#ifndef PT_CODECS_H_
#define PT_CODECS_H_

#include <stddef.h>

#include "pt/track_fusion.h"

#if defined(__cplusplus)
extern "C" {
#endif

typedef enum pt_codec {
  PT_CODEC_NONE = 0,
  PT_CODEC_INT8 = 1, /* groups of 32, bfloat16 scale: 8.5 bits per value */
  PT_CODEC_FP8 = 2,  /* e4m3, groups of 128, bfloat16 scale: 8.125 bits */
  PT_CODEC_INT4 = 3, /* groups of 32, bfloat16 scale: 4.5 bits */
  PT_CODEC_MXFP4 = 4 /* e2m1, groups of 32, e8m0 scale: 4.25 bits */
} pt_codec;

/* Bytes of an encoded [rows, hidden]; 0 for an unknown codec, PT_CODEC_NONE, or a matrix without values. */
PT_API size_t pt_codec_encoded_bytes(int codec, size_t rows, size_t hidden) PT_NOEXCEPT;

/* encoded = x, or x - base when base is not null (in fp32). x and base are of `dtype`; `encoded` has
 * pt_codec_encoded_bytes() bytes and overlaps neither. */
PT_API int pt_codec_encode(int codec, const void* x, const void* base, int dtype, size_t rows, size_t hidden,
                           void* encoded) PT_NOEXCEPT;

/* Values in fp32. A group with a NaN, an infinity or a magnitude of 2^126 and more decodes to NaN as a whole. */
PT_API int pt_codec_decode(int codec, const void* encoded, size_t rows, size_t hidden, float* values) PT_NOEXCEPT;

/* How a coded message travels. The result does not depend on it without a codec; with one, values are rounded once by
 * PT_ONE_SHOT and twice by PT_TWO_SHOT. */
typedef enum pt_algorithm {
  PT_AUTO = 0,     /* by the size of the message and the number of ranks, the same on all ranks */
  PT_ONE_SHOT = 1, /* everybody encodes its contribution, everybody decodes all */
  PT_TWO_SHOT = 2  /* each rank adds up a slice of the encoded contributions and encodes the result for everybody */
} pt_algorithm;

/* pt_track_fusion_fuse with an encoded payload; `codec` is not PT_CODEC_NONE. Every rank decodes the same bytes, its
 * own included: all ranks get the same bits. one-shot:  sum = ((y[0] + y[1]) + y[2]) + ...,  y[r] =
 * decode(encode(x[r]));  m = sum * fp32(1 / size) for the mean two-shot:  the same, and m = decode(encode(m)) h =
 * round(m), or round(fp32(residual) + m) With `delta`, x[r] - residual is encoded instead of x[r] (PT_MEAN only): the
 * residual is then what all ranks already have, h is the mean of x, and the error is relative to what changed. */
PT_API int pt_track_fusion_fuse_coded(pt_group* group, const void* x, const void* residual, void* h, size_t tokens,
                                      size_t hidden, int dtype, int reduction, const void* gamma, size_t num_gammas,
                                      int gamma_dtype, float eps, void* norm_out, int codec, int delta, int algorithm,
                                      double timeout_s) PT_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_CODECS_H_ */
