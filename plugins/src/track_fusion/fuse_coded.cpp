// SPDX-License-Identifier: Apache-2.0
// Fusion with an encoded payload. The same steps as fuse.cpp, cut at groups instead of elements; every rank decodes the
// bytes it sent as well, so that all ranks get the same bits.
#include <algorithm>

#include "pt/codecs.h"
#include "track_fusion/group.h"

namespace pt::track_fusion {

codecs::Format Group::format_of(const CodecArgs& coding) const {
  return codecs::Format(codecs::kernels_named(kernels_->name).codecs[coding.codec - 1]);
}

void Group::fuse_coded(const FuseArgs& args, const CodecArgs& coding, double timeout_s) {
  const CallRecord record = {.operation = Operation::kFuse,
                             .dtype = static_cast<uint8_t>(args.dtype),
                             .reduction = static_cast<uint8_t>(args.reduction),
                             .has_residual = args.residual != nullptr,
                             .codec = static_cast<uint8_t>(coding.codec),
                             .algorithm = static_cast<uint8_t>(coding.algorithm),
                             .delta = coding.delta,
                             .rows = args.tokens,
                             .columns = args.hidden};
  const bool two_shot = coding.algorithm == PT_AUTO ? takes_two_phases(args) : coding.algorithm == PT_TWO_SHOT;
  run(record, timeout_s, [&] {
    if (two_shot) {
      reduce_coded_two_shot(args, coding);
    } else {
      reduce_coded_one_shot(args, coding);
    }
  });
}

void Group::reduce_coded_one_shot(const FuseArgs& args, const CodecArgs& coding) {
  const codecs::Format format = format_of(coding);
  const size_t per_row = format.groups_per_row(args.hidden);
  const size_t total = args.tokens * per_row;
  const size_t piece = format.groups_in(std::min(capacity_, kPieceBytes));
  codecs::ConstEncoded sources[PT_TRACK_FUSION_MAX_RANKS];
  size_t done = 0;
  do {  // no tokens: one empty step, so that the ranks stay in step
    const codecs::GroupRange range = {args.hidden, done, std::min(piece, total - done)};
    begin_step();
    format.kernels().encode[args.dtype](args.x, coding.delta ? args.residual : nullptr, range,
                                        format.part(inbox(rank_), range.count, 0));
    post();
    await_all();
    for (int rank = 0; rank < size_; ++rank) sources[rank] = format.sent_part(inbox(rank), range.count, 0);
    format.kernels().reduce[args.dtype](sources, size_, args.residual, scale_of(args, size_), args.h, range);
    norm_rows(args, done / per_row, (done + range.count) / per_row);
    done += range.count;
  } while (done < total);
}

void Group::reduce_coded_two_shot(const FuseArgs& args, const CodecArgs& coding) {
  const codecs::Format format = format_of(coding);
  const size_t per_row = format.groups_per_row(args.hidden);
  const size_t total = args.tokens * per_row;
  const size_t piece = format.groups_in(std::min(capacity_, kPieceBytes));
  const auto ranks = static_cast<size_t>(size_);
  codecs::ConstEncoded sources[PT_TRACK_FUSION_MAX_RANKS];
  size_t done = 0;
  do {
    const codecs::GroupRange range = {args.hidden, done, std::min(piece, total - done)};
    const size_t slice = (range.count + ranks - 1) / ranks;
    const auto slice_of = [&](int rank) {
      const size_t begin = std::min(range.count, slice * static_cast<size_t>(rank));
      return codecs::GroupRange{args.hidden, done + begin, std::min(range.count, begin + slice) - begin};
    };

    begin_step();
    format.kernels().encode[args.dtype](args.x, coding.delta ? args.residual : nullptr, range,
                                        format.part(inbox(rank_), range.count, 0));
    post();
    await_all();
    const codecs::GroupRange own = slice_of(rank_);
    for (int rank = 0; rank < size_; ++rank) {
      sources[rank] = format.sent_part(inbox(rank), range.count, own.first - done);
    }

    begin_step();
    format.kernels().reduce_encode(sources, size_, scale_of(args, size_), own.count,
                                   format.part(inbox(rank_), own.count, 0));
    post();
    for (int next = 0; next < size_; ++next) {
      const int rank = (rank_ + next) % size_;  // own slice first, then neighbours: spreads the reads
      await(rank);
      const codecs::GroupRange theirs = slice_of(rank);
      const codecs::ConstEncoded source = format.sent_part(inbox(rank), theirs.count, 0);
      format.kernels().reduce[args.dtype](&source, 1, args.residual, 1.0f, args.h, theirs);
    }
    norm_rows(args, done / per_row, (done + range.count) / per_row);
    done += range.count;
  } while (done < total);
}

}  // namespace pt::track_fusion
