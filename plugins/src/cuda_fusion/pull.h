// SPDX-License-Identifier: Apache-2.0
// Medium messages: every rank stages its message in its own memory, blocks meet, everybody reads all messages.
//
// Two generations of staging memory and no barrier at the end: a rank writes generation g again in piece k + 2, which
// it enters after all peers have entered k + 1, that is, have read piece k. A block reads only what blocks of its own
// index wrote, whatever the size of the message.
#pragma once

#include "cuda_fusion/barrier.h"
#include "cuda_fusion/payload.h"

namespace pt::cuda_fusion {
namespace {

template <typename Memory, typename Payload>
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
        const uint32_t packets = Payload::packets(call, row);
        for (uint32_t c = team.thread(); c - c % Payload::kLanes < packets; c += team.size()) {
          const typename Payload::Packet packet = Payload::make(call, row, c);
          if (c < packets) Payload::template store<Staged>(call, mine + (row - first) * call.row_vectors, c, packet);
        }
      }
      const bool alive = meet_peers(channel, team, waiter, Phase::kFirst, epoch);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        float squares = 0.0f;
        for (uint32_t c = team.thread(); c < Payload::packets(call, row); c += team.size()) {
          float sums[Payload::kValues] = {};
          if (alive) collect(channel, call, staging, (row - first) * call.row_vectors, c, sums);
          squares = add(squares, store_packet<Payload>(call, row, c, sums, alive));
        }
        if (call.num_gammas != 0) norm_row<typename Payload::Type>(call, team, row, squares);
      }
      waiter.next_epoch();
    }
    finish_pieces<Memory>(channel.control, team, call.num_pieces);
  }

 private:
  static PT_HOST_DEVICE void collect(const Channel& channel, const Call& call, uint64_t staging, uint64_t row_at,
                                     uint32_t c, float* sums) {
    add_ranks<Payload, kPacketsAtOnce>(call, channel.size, c, sums, [&](uint32_t rank) {
      return Payload::template load<Staged>(call, channel.at<Vector>(rank, staging) + row_at, c);
    });
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
