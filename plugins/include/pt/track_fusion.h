/* SPDX-License-Identifier: Apache-2.0
 *
 * Track fusion: collectives of one group of ranks (processes or threads) on one host. C ABI, no other dependency.
 *
 * A group handle is one rank's membership. Rank 0 creates a group, hands the name to the others (how is the caller's
 * business), they attach; the last one to attach removes the name, so that a killed process leaves nothing behind.
 *
 * Every function returns PT_OK or a pt_status; the text is in pt_last_error() of the calling thread. No function
 * throws. A handle serves one thread at a time (a second one gets PT_INVALID_ARGUMENT); only pt_track_fusion_abort may
 * be called from any thread. All ranks call the same collectives in the same order with the same sizes. A rank that
 * does not is reported as PT_MISMATCH. PT_INVALID_ARGUMENT leaves the group usable; any other failure poisons it: every
 * later call fails at once with the first reason, and the peers stop waiting.
 *
 * Time-outs: the limit of one wait without progress, in seconds. Negative: the group's default. 0: no limit, but a dead
 * peer, a closed peer or an abort still ends the wait.
 *
 * Arithmetic (all ranks get the same bits, on every instruction set):
 *   sum    = ((x[0] + x[1]) + x[2]) + ...             fp32, in rank order, own contribution included in its place
 *   m      = sum * fp32(1 / size) for the mean, sum otherwise
 *   h      = round(m), or round(fp32(residual) + m)   rounded once, to nearest even, to the tensor's type
 *   r      = 1 / sqrt(sum_of_squares(h) / hidden + eps)  fp32, from the rounded h; 16 lanes (element i in lane i % 16),
 *            then lanes folded 8, 4, 2, 1
 *   normed = round((h * r) * gamma)
 * NaN and infinity pass through; a NaN result is the positive quiet NaN of its type.
 */
#ifndef PT_TRACK_FUSION_H_
#define PT_TRACK_FUSION_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus)
#define PT_NOEXCEPT noexcept
extern "C" {
#else
#define PT_NOEXCEPT
#endif

#define PT_API __attribute__((visibility("default")))
#define PT_TRACK_FUSION_ABI_VERSION 1
#define PT_TRACK_FUSION_MAX_RANKS 64

typedef enum pt_status {
  PT_OK = 0,
  PT_INVALID_ARGUMENT = 1, /* refused before anything was sent; the group stays usable */
  PT_TIMEOUT = 2,          /* a peer is alive but did not arrive */
  PT_PEER_LOST = 3,        /* a peer's process is gone, or it closed the group */
  PT_MISMATCH = 4,         /* ranks called different operations or sizes */
  PT_ABORTED = 5,          /* another rank, or pt_track_fusion_abort, ended the group */
  PT_SYSTEM_ERROR = 6,     /* the operating system refused something */
  PT_UNSUPPORTED = 7,      /* this machine or build cannot do it */
  PT_INTERNAL = 8,         /* a bug in this library */
  PT_NOT_READY = 9         /* pt_track_fusion_poll only: nothing has arrived yet */
} pt_status;

typedef enum pt_dtype { PT_FLOAT32 = 0, PT_BFLOAT16 = 1, PT_FLOAT16 = 2 } pt_dtype;
typedef enum pt_reduction { PT_MEAN = 0, PT_SUM = 1 } pt_reduction;

typedef struct pt_group pt_group;

/* Text of the last failure in this thread; valid until the thread's next failure. */
PT_API const char* pt_last_error(void) PT_NOEXCEPT;
PT_API int pt_track_fusion_abi_version(void) PT_NOEXCEPT;

/* Makes a group of `size` ranks and joins it as rank 0. `capacity_bytes`: inbox of one rank and generation (rounded up;
 * longer messages are sent in pieces). The segment takes about 2 * size * capacity_bytes of /dev/shm. */
PT_API int pt_track_fusion_create(int size, size_t capacity_bytes, double timeout_s, pt_group** group) PT_NOEXCEPT;
PT_API int pt_track_fusion_attach(const char* name, int rank, int size, double timeout_s, pt_group** group) PT_NOEXCEPT;

/* Name to attach with. Lives as long as the handle. */
PT_API const char* pt_track_fusion_name(const pt_group* group) PT_NOEXCEPT;
/* Instruction set of the loops this group runs: "baseline", "avx2" or "avx512". */
PT_API const char* pt_track_fusion_isa(const pt_group* group) PT_NOEXCEPT;

/* Waits until every rank has attached and makes sure that the name is gone. */
PT_API int pt_track_fusion_unlink(pt_group* group, double timeout_s) PT_NOEXCEPT;

/* x, h, residual: [tokens, hidden]. norm_out: [num_gammas, tokens, hidden]; gamma: [num_gammas, hidden] of gamma_dtype
 * (dtype or PT_FLOAT32). residual may be null; gamma and norm_out are null exactly when num_gammas is 0. h may be x or
 * residual; norm_out overlaps nothing. tokens may be 0: the rank still takes part. The residual is the caller's own
 * (equal residuals on all ranks give equal h); whether there is one, and tokens, hidden and dtype, are the same on all
 * ranks. */
PT_API int pt_track_fusion_fuse(pt_group* group, const void* x, const void* residual, void* h, size_t tokens,
                                size_t hidden, int dtype, int reduction, const void* gamma, size_t num_gammas,
                                int gamma_dtype, float eps, void* norm_out, double timeout_s) PT_NOEXCEPT;

/* out[i] = sum over ranks of x[i]; out may be x. */
PT_API int pt_track_fusion_all_reduce(pt_group* group, const void* x, void* out, size_t count, int dtype,
                                      double timeout_s) PT_NOEXCEPT;

/* `bytes` bytes from root's buffer to everyone's. Root may return before the others have read. */
PT_API int pt_track_fusion_broadcast(pt_group* group, void* buffer, size_t bytes, int root,
                                     double timeout_s) PT_NOEXCEPT;

/* Each rank's [rows, row_bytes] becomes [rows, size * row_bytes] at root, ranks side by side in every row. With rows =
 * 1 that is [rank][row_bytes]. `out` is used at root only; others return as soon as their part is in shared memory. */
PT_API int pt_track_fusion_gather(pt_group* group, const void* in, size_t rows, size_t row_bytes, void* out, int root,
                                  double timeout_s) PT_NOEXCEPT;

PT_API int pt_track_fusion_barrier(pt_group* group, double timeout_s) PT_NOEXCEPT;

/* Waits until `peer` has entered the next collective. PT_NOT_READY after `timeout_s` (or a signal), without harm: an
 * idle rank can sleep here in slices and look at its own signals in between. */
PT_API int pt_track_fusion_poll(pt_group* group, int peer, double timeout_s) PT_NOEXCEPT;

/* Ends the group on all ranks; they report `reason`. Any thread, any time between create/attach and close. */
PT_API int pt_track_fusion_abort(pt_group* group, const char* reason) PT_NOEXCEPT;

/* Leaves the group and frees the handle. PT_INVALID_ARGUMENT (and nothing freed) while another thread is inside a call.
 */
PT_API int pt_track_fusion_close(pt_group* group) PT_NOEXCEPT;

#if defined(__cplusplus)
} /* extern "C" */
#endif

#endif /* PT_TRACK_FUSION_H_ */
