/* SPDX-License-Identifier: Apache-2.0
 *
 * Track fusion on GPUs: h = mean or sum over ranks of x (+ residual), and RMSNorm of h, without leaving the device. C
 * ABI: plain pointers, sizes and a stream.
 *
 * A channel is one rank's end of a group of ranks whose GPUs reach each other's memory. Opening and closing are
 * collective and exchange a few bytes over the caller's own means; fusing is asynchronous, ordered by the stream, and
 * may be captured into a CUDA graph: all counters live on the device. All ranks fuse in the same order with the same
 * tokens, hidden, dtype, reduction, presence of a residual and of gammas, and algorithm. One channel belongs to one
 * stream order: never to two streams at once, never to two execution contexts.
 *
 * Arithmetic: that of pt/track_fusion.h, so h has the same bits on every rank, by every algorithm, and on the CPU, but
 * for the sign of a zero; with a codec that of pt/codecs.h, where algorithms differ in how often they round.
 * PT_FUSION_NVLS alone promises less, see there. The squares of a row are added in another shape than on the CPU: norms
 * agree with it to one rounding of their type (2^-20 in float32), and with each other to the bit.
 *
 * A wait that exceeds the time limit ends the channel on all ranks: outputs become zeros, and the next call here
 * reports who waited for whom. Nothing hangs silently.
 *
 * Every function returns PT_OK or a pt_status; the text is in pt_cuda_fusion_last_error() of the calling thread.
 * Nothing throws. A channel serves one thread at a time; pt_cuda_fusion_abort may come from another one.
 */
#ifndef PT_CUDA_FUSION_H_
#define PT_CUDA_FUSION_H_

#include "pt/codecs.h" /* pt_codec, and pt_status, pt_dtype, pt_reduction, PT_API */

#if defined(__cplusplus)
extern "C" {
#endif

#define PT_CUDA_FUSION_ABI_VERSION 3
#define PT_CUDA_FUSION_MAX_RANKS 16

typedef struct pt_cuda_fusion pt_cuda_fusion;

/* How a rank comes to address the memory of another one. */
typedef enum pt_cuda_fusion_provider {
  PT_FUSION_HOST_THREADS =
      0, /* no GPU: threads of one process, the same protocols on host memory; `stream` is unused */
  PT_FUSION_SAME_PROCESS = 1, /* threads of one process, each with its own GPU (or sharing one) */
  PT_FUSION_CUDA_IPC = 2,     /* processes of one host: cudaIpcMemHandle */
  PT_FUSION_VMM = 3           /* processes of one host: cuMemCreate, file descriptors over a Unix socket */
} pt_cuda_fusion_provider;

/* PT_FUSION_AUTO chooses from size and number of ranks. PT_FUSION_ENCODE_ONCE does so, too, but leaves out what encodes
 * a message twice (two-shot with a codec). The others are for tests and measurements, but for PT_FUSION_NVLS, which is
 * never chosen. Its sums are made by the NVLink switch, in an order and precision of its own: all ranks get the same
 * bits, and the same call again may give others. Needs use_nvls, 2 ranks or more, no codec. */
typedef enum pt_cuda_fusion_algorithm {
  PT_FUSION_ENCODE_ONCE = -2,
  PT_FUSION_AUTO = -1,
  PT_FUSION_ONE_SHOT = 0,
  PT_FUSION_PULL = 1,
  PT_FUSION_TWO_SHOT = 2,
  PT_FUSION_NCCL = 3,
  PT_FUSION_NVLS = 4
} pt_cuda_fusion_algorithm;

/* The same on all ranks but for `rank` and `device`. Zero takes the default. */
typedef struct pt_cuda_fusion_config {
  uint32_t struct_bytes; /* sizeof(pt_cuda_fusion_config) */
  int32_t size;
  int32_t rank;
  int32_t provider;
  int32_t device;          /* CUDA device ordinal; -1: the current one */
  uint32_t num_blocks;     /* of all but one-shot, up to 64; all must fit on the device at once. Default 32 */
  uint64_t one_shot_bytes; /* largest message of one rank in one piece; default from the number of ranks */
  uint64_t pull_bytes;     /* up to here everybody reads everything; default from the number of ranks */
  uint64_t two_shot_bytes; /* up to here two-shot, NCCL above; default from the number of ranks */
  uint64_t staging_bytes;  /* room of all but one-shot, longer messages go in pieces. Default 16 MiB */
  double timeout_s;        /* of one wait; default 10. Negative: no limit */
  int32_t use_nccl;        /* look for libnccl.so.2; used when every rank has it */
  int32_t strict_order;    /* system-scope fences that the one-shot protocol does not need on known hardware */
  int32_t use_nvls;        /* multicast memory of staging_bytes, for PT_FUSION_NVLS; a GPU for each rank. Opening fails
                            * on all ranks where one has none; on PT_FUSION_HOST_THREADS it is emulated */
} pt_cuda_fusion_config;

/* recv = [size][bytes]: what every rank sent, in rank order. Called by all ranks equally often. 0: done. */
typedef int (*pt_cuda_fusion_all_gather)(void* context, const void* send, void* recv, size_t bytes);

typedef struct pt_cuda_fusion_arguments {
  uint32_t struct_bytes; /* sizeof(pt_cuda_fusion_arguments) */
  int32_t dtype;
  int32_t reduction;
  int32_t algorithm; /* PT_FUSION_AUTO */
  uint64_t tokens;   /* 0: nothing happens, on all ranks alike */
  uint64_t hidden;
  const void* x;        /* [tokens, hidden] */
  const void* residual; /* [tokens, hidden] or null */
  void* h;              /* [tokens, hidden]; may be x or residual */
  const void* gamma;    /* [num_gammas, hidden] of gamma_dtype (dtype or PT_FLOAT32), or null */
  void* norm_out;       /* [num_gammas, tokens, hidden]; overlaps nothing */
  uint32_t num_gammas;
  int32_t gamma_dtype;
  float eps;
  int32_t codec; /* pt_codec: what travels is encoded; every rank decodes the same bytes, its own included. One-shot and
                  * pull encode once, with the bits of pt_track_fusion_fuse_coded with PT_ONE_SHOT; two-shot encodes
                  * the sums again, with those of PT_TWO_SHOT. NCCL has no coded form */
  int32_t delta; /* with a codec, a mean and a residual that all ranks have alike: x - residual is encoded */
} pt_cuda_fusion_arguments;

PT_API const char* pt_cuda_fusion_last_error(void) PT_NOEXCEPT;
PT_API int pt_cuda_fusion_abi_version(void) PT_NOEXCEPT;

/* 1 if this library was built with CUDA. It opens channels of PT_FUSION_HOST_THREADS in any case. */
PT_API int pt_cuda_fusion_has_cuda(void) PT_NOEXCEPT;

/* Collective. Either all ranks get a channel or all fail; only a wrong `size` is refused before the ranks talk. */
PT_API int pt_cuda_fusion_open(const pt_cuda_fusion_config* config, pt_cuda_fusion_all_gather all_gather, void* context,
                               pt_cuda_fusion** channel) PT_NOEXCEPT;

/* Enqueues on `stream` (a cudaStream_t) and returns. Reports what an earlier call met, see pt_cuda_fusion_status. */
PT_API int pt_cuda_fusion_fuse(pt_cuda_fusion* channel, const pt_cuda_fusion_arguments* arguments,
                               void* stream) PT_NOEXCEPT;

/* PT_OK, or what ended the channel. Does not wait: ask after synchronising with the stream. */
PT_API int pt_cuda_fusion_status(pt_cuda_fusion* channel) PT_NOEXCEPT;

/* What pt_cuda_fusion_fuse would use: a pt_cuda_fusion_algorithm, or -1 for bad arguments. */
PT_API int pt_cuda_fusion_algorithm_for(pt_cuda_fusion* channel, const pt_cuda_fusion_arguments* arguments) PT_NOEXCEPT;

/* Ends the channel on all ranks, whatever they wait for. */
PT_API int pt_cuda_fusion_abort(pt_cuda_fusion* channel) PT_NOEXCEPT;

/* Collective: nobody frees memory that another rank still maps. Frees the handle in any case. */
PT_API int pt_cuda_fusion_close(pt_cuda_fusion* channel) PT_NOEXCEPT;

/* A process-wide registry, for adapters that meet a channel by name only (TensorRT engines). The name is unique; the
 * channel must outlive its entry. Null removes the entry. */
PT_API int pt_cuda_fusion_register(const char* name, pt_cuda_fusion* channel) PT_NOEXCEPT;
/* The channel of that name, or null. */
PT_API pt_cuda_fusion* pt_cuda_fusion_find(const char* name) PT_NOEXCEPT;
/* Ranks of a channel; 0 for null. */
PT_API int pt_cuda_fusion_size(const pt_cuda_fusion* channel) PT_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_CUDA_FUSION_H_ */
