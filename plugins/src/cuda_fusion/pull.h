// SPDX-License-Identifier: Apache-2.0
// Medium messages: every rank stages its message in its own memory, blocks meet, everybody reads all messages.
//
// Two generations of staging memory and no barrier at the end: a rank writes generation g again in piece k + 2, which
// it enters after all peers have entered k + 1, that is, have read piece k. A block reads only what blocks of its own
// index wrote, whatever the size of the message.
#pragma once

#include "cuda_fusion/barrier.h"
#include "cuda_fusion/row.h"

namespace pt::cuda_fusion {
namespace {

template <typename Memory, typename Type, int kRanks>
class Pull {
 public:
  template <typename Team>
  static PT_HOST_DEVICE void run(const Channel& channel, const Call& call, Team& team) {
    const uint32_t first_epoch = channel.control->staged_epoch + 1;
    Waiter<Memory> waiter(channel, Algorithm::kPull, first_epoch);
    for (uint32_t piece = 0; piece < call.num_pieces; ++piece) {
      const uint32_t epoch = first_epoch + piece;
      const uint64_t first = piece * call.piece_rows;
      const uint64_t last = first + call.piece_rows < call.rows ? first + call.piece_rows : call.rows;
      const uint64_t staging = channel.layout.scatter(epoch);
      Vector* mine = channel.at<Vector>(channel.rank, staging);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
          mine[(row - first) * call.row_vectors + c] = without_sentinel(load_vector<Type>(call, call.x, row, c));
        }
      }
      const bool alive = meet_peers(channel, team, waiter, Phase::kFirst, epoch);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        float squares = 0.0f;
        for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
          Vector h = filled(0);
          if (alive) {
            float sums[kPerVector<Type>];
            collect(channel, staging, (row - first) * call.row_vectors + c, sums);
            h = finish_sum<Type>(call, row, c, sums);
          }
          squares = add(squares, store_h<Type>(call, row, c, h));
        }
        if (call.num_gammas != 0) norm_row<Type>(call, team, row, squares);
      }
      waiter.next_epoch();
    }
    finish_pieces<Memory>(channel.control, team, call.num_pieces);
  }

 private:
  static PT_HOST_DEVICE void collect(const Channel& channel, uint64_t staging, uint64_t at, float* sums) {
    const uint32_t n = kRanks != 0 ? kRanks : channel.size;
    if constexpr (kRanks != 0) {
      Vector words[kRanks];
      PT_UNROLL
      for (uint32_t rank = 0; rank < kRanks; ++rank) words[rank] = channel.at<Vector>(rank, staging)[at];
      start<Type>(sums, words[0]);
      PT_UNROLL
      for (uint32_t rank = 1; rank < kRanks; ++rank) accumulate<Type>(sums, words[rank]);
    } else {
      start<Type>(sums, channel.at<Vector>(0, staging)[at]);
      for (uint32_t rank = 1; rank < n; ++rank) accumulate<Type>(sums, channel.at<Vector>(rank, staging)[at]);
    }
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
