// SPDX-License-Identifier: Apache-2.0
// Mean or sum over ranks, with residual and RMSNorm. Both algorithms add in rank order and round once.
#include <algorithm>
#include <cstring>

#include "track_fusion/group.h"

namespace pt::track_fusion {
namespace {

// From this message size on, and with at least this many ranks, each rank reduces a slice and the others copy it. With
// two ranks the traffic is the same and one more exchange is lost.
constexpr size_t kTwoPhaseBytes = size_t{64} << 10;
constexpr int kTwoPhaseRanks = 3;
constexpr size_t kSliceAlign = 64;  // elements: slices start on cache lines

const std::byte* at(const void* base, size_t bytes) { return static_cast<const std::byte*>(base) + bytes; }
std::byte* at(void* base, size_t bytes) { return static_cast<std::byte*>(base) + bytes; }

}  // namespace

bool Group::takes_two_phases(const FuseArgs& args) const {
  return size_ >= kTwoPhaseRanks && args.tokens * args.hidden * dtype_bytes(args.dtype) >= kTwoPhaseBytes;
}

void Group::reduce(const FuseArgs& args) {
  if (takes_two_phases(args)) {
    reduce_two_phase(args);
  } else {
    reduce_one_shot(args);
  }
}

void Group::reduce_one_shot(const FuseArgs& args) {
  const size_t element_bytes = dtype_bytes(args.dtype);
  const size_t total = args.tokens * args.hidden;
  const size_t piece = std::min(capacity_, kPieceBytes) / element_bytes;
  const void* sources[PT_TRACK_FUSION_MAX_RANKS];
  size_t done = 0;
  size_t normed_rows = 0;
  do {  // no tokens: one empty step, so that the ranks stay in step
    const size_t count = std::min(piece, total - done);
    const size_t offset = done * element_bytes;
    begin_step();
    if (count > 0) std::memcpy(inbox(rank_), at(args.x, offset), count * element_bytes);
    post();
    await_all();
    for (int rank = 0; rank < size_; ++rank) sources[rank] = inbox(rank);
    const void* residual = args.residual == nullptr ? nullptr : at(args.residual, offset);
    kernels_->reduce[args.dtype](sources, size_, residual, scale_of(args, size_), at(args.h, offset), count);
    done += count;
    const size_t complete_rows = args.hidden == 0 ? 0 : done / args.hidden;
    norm_rows(args, normed_rows, complete_rows);
    normed_rows = complete_rows;
  } while (done < total);
}

void Group::reduce_two_phase(const FuseArgs& args) {
  const size_t element_bytes = dtype_bytes(args.dtype);
  // With a residual the owner hands on the unrounded fp32 mean: rounding happens once, after the addition.
  const size_t slice_bytes = args.residual == nullptr ? element_bytes : sizeof(float);
  const size_t total = args.tokens * args.hidden;
  // A slice of size_ >= 3 ranks is at most half a piece (rounding included), so fp32 slices of 2-byte elements fit as
  // well.
  const size_t piece = std::min(capacity_, kPieceBytes) / element_bytes;
  const void* sources[PT_TRACK_FUSION_MAX_RANKS];
  size_t normed_rows = 0;
  for (size_t done = 0; done < total; done += piece) {
    const size_t count = std::min(piece, total - done);
    const size_t per_rank = (count + static_cast<size_t>(size_) - 1) / static_cast<size_t>(size_);
    const size_t slice = (per_rank + kSliceAlign - 1) / kSliceAlign * kSliceAlign;
    const auto slice_begin = [&](int rank) { return std::min(count, slice * static_cast<size_t>(rank)); };
    const auto slice_count = [&](int rank) { return slice_begin(rank + 1) - slice_begin(rank); };

    begin_step();
    std::memcpy(inbox(rank_), at(args.x, done * element_bytes), count * element_bytes);
    post();
    await_all();
    for (int rank = 0; rank < size_; ++rank) sources[rank] = inbox(rank) + slice_begin(rank_) * element_bytes;

    begin_step();
    if (args.residual == nullptr) {
      kernels_->reduce[args.dtype](sources, size_, nullptr, scale_of(args, size_), inbox(rank_), slice_count(rank_));
    } else {
      kernels_->reduce_to_float[args.dtype](sources, size_, scale_of(args, size_),
                                            reinterpret_cast<float*>(inbox(rank_)), slice_count(rank_));
    }
    post();
    for (int next = 0; next < size_; ++next) {
      const int rank = (rank_ + next) % size_;  // own slice first, then neighbours: spreads the reads
      await(rank);
      const size_t offset = (done + slice_begin(rank)) * element_bytes;
      if (args.residual == nullptr) {
        std::memcpy(at(args.h, offset), inbox(rank), slice_count(rank) * slice_bytes);
      } else {
        kernels_->add_residual[args.dtype](reinterpret_cast<const float*>(inbox(rank)), at(args.residual, offset),
                                           at(args.h, offset), slice_count(rank));
      }
    }
    const size_t complete_rows = (done + count) / args.hidden;
    norm_rows(args, normed_rows, complete_rows);
    normed_rows = complete_rows;
  }
}

void Group::norm_rows(const FuseArgs& args, size_t first_row, size_t last_row) const {
  if (args.num_gammas == 0 || first_row == last_row) return;
  const size_t offset = first_row * args.hidden * dtype_bytes(args.dtype);
  kernels_->rms_norm[args.dtype][args.gamma_dtype == PT_FLOAT32](
      at(args.h, offset), args.gamma, args.num_gammas, args.eps, at(args.norm_out, offset), args.tokens * args.hidden,
      last_row - first_row, args.hidden);
}

void Group::fuse(const FuseArgs& args, double timeout_s) {
  const CallRecord record = {.operation = Operation::kFuse,
                             .dtype = static_cast<uint8_t>(args.dtype),
                             .reduction = static_cast<uint8_t>(args.reduction),
                             .has_residual = args.residual != nullptr,
                             .rows = args.tokens,
                             .columns = args.hidden};
  run(record, timeout_s, [&] { reduce(args); });
}

void Group::all_reduce(const void* x, void* out, size_t count, int dtype, double timeout_s) {
  const FuseArgs args = {.x = x,
                         .residual = nullptr,
                         .h = out,
                         .tokens = 1,
                         .hidden = count,
                         .dtype = dtype,
                         .reduction = PT_SUM,
                         .gamma = nullptr,
                         .num_gammas = 0,
                         .gamma_dtype = dtype,
                         .eps = 0,
                         .norm_out = nullptr};
  const CallRecord record = {
      .operation = Operation::kAllReduce, .dtype = static_cast<uint8_t>(dtype), .columns = count};
  run(record, timeout_s, [&] { reduce(args); });
}

}  // namespace pt::track_fusion
