// SPDX-License-Identifier: Apache-2.0
// Larger messages: every rank owns a slice of the columns of each row. Slices are pushed to their owners, blocks meet,
// the owner adds them and pushes the same bytes to everybody, itself included; blocks meet again.
//
// Two generations, as in pull.h, and no barrier at the end. Per link 2 (n - 1) / n of a message instead of n - 1.
#pragma once

#include "cuda_fusion/barrier.h"
#include "cuda_fusion/row.h"

namespace pt::cuda_fusion {
namespace {

template <typename Memory, typename Type, int kRanks>
class TwoShot {
 public:
  template <typename Team>
  static PT_HOST_DEVICE void run(const Channel& channel, const Call& call, Team& team) {
    const uint32_t first_epoch = channel.control->staged_epoch + 1;
    Waiter<Memory> waiter(channel, Algorithm::kTwoShot, first_epoch);
    for (uint32_t piece = 0; piece < call.num_pieces; ++piece) {
      const uint32_t epoch = first_epoch + piece;
      const uint64_t first = piece * call.piece_rows;
      const uint64_t last = first + call.piece_rows < call.rows ? first + call.piece_rows : call.rows;
      const Piece rows = {first, last, channel.layout.scatter(epoch), channel.layout.gather(epoch)};
      scatter(channel, call, team, rows);
      if (meet_peers(channel, team, waiter, Phase::kFirst, epoch)) reduce(channel, call, team, rows);
      const bool alive = meet_peers(channel, team, waiter, Phase::kSecond, epoch);
      const Vector* sums = channel.at<Vector>(channel.rank, rows.gather_at);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        float squares = 0.0f;
        for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
          const Vector h = alive ? sums[(row - first) * call.row_vectors + c] : filled(0);
          squares = add(squares, store_h<Type>(call, row, c, h));
        }
        if (call.num_gammas != 0) norm_row<Type>(call, team, row, squares);
      }
      waiter.next_epoch();
    }
    finish_pieces<Memory>(channel.control, team, call.num_pieces);
  }

 private:
  struct Piece {
    uint64_t first;
    uint64_t last;
    uint64_t scatter_at;
    uint64_t gather_at;
  };

  static PT_HOST_DEVICE uint32_t num_ranks(const Channel& channel) { return kRanks != 0 ? kRanks : channel.size; }
  static PT_HOST_DEVICE uint32_t slice_vectors(const Channel& channel, const Call& call) {
    return (call.row_vectors + num_ranks(channel) - 1) / num_ranks(channel);
  }
  // Vectors between two sources in a scatter inbox: of a whole piece, even when this one is shorter.
  static PT_HOST_DEVICE uint64_t source_vectors(const Channel& channel, const Call& call) {
    return call.piece_rows * slice_vectors(channel, call);
  }

  template <typename Team>
  static PT_HOST_DEVICE void scatter(const Channel& channel, const Call& call, Team& team, const Piece& piece) {
    const uint32_t slice = slice_vectors(channel, call);
    const uint64_t source = channel.rank * source_vectors(channel, call);
    for (uint64_t row = piece.first + team.block(); row < piece.last; row += team.num_blocks()) {
      for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
        const uint32_t owner = c / slice;
        const uint64_t at = source + (row - piece.first) * slice + c % slice;
        channel.at<Vector>(owner, piece.scatter_at)[at] = without_sentinel(load_vector<Type>(call, call.x, row, c));
      }
    }
  }

  template <typename Team>
  static PT_HOST_DEVICE void reduce(const Channel& channel, const Call& call, Team& team, const Piece& piece) {
    const uint32_t n = num_ranks(channel);
    const uint32_t slice = slice_vectors(channel, call);
    const uint64_t stride = source_vectors(channel, call);
    const Vector* inbox = channel.at<Vector>(channel.rank, piece.scatter_at);
    for (uint64_t row = piece.first + team.block(); row < piece.last; row += team.num_blocks()) {
      const uint32_t end = call.vectors_in<Type>(row);
      for (uint32_t s = team.thread(); s < slice && channel.rank * slice + s < end; s += team.size()) {
        const uint32_t c = channel.rank * slice + s;
        const uint64_t at = (row - piece.first) * slice + s;
        float sums[kPerVector<Type>];
        start<Type>(sums, inbox[at]);
        PT_UNROLL
        for (uint32_t rank = 1; rank < n; ++rank) accumulate<Type>(sums, inbox[rank * stride + at]);
        const Vector h = finish_sum<Type>(call, row, c, sums);
        for (uint32_t step = 0; step < n; ++step) {
          const uint32_t peer = channel.rank + step < n ? channel.rank + step : channel.rank + step - n;
          channel.at<Vector>(peer, piece.gather_at)[(row - piece.first) * call.row_vectors + c] = h;
        }
      }
    }
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
