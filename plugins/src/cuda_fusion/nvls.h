// SPDX-License-Identifier: Apache-2.0
// Messages that the NVLink switch adds: every rank stages its message in its replica of the multicast memory, blocks
// meet, each rank has its slice of all replicas added by the switch and stores the sums in all of them; blocks meet
// again, and each rank finishes h from its own replica. Per link a message and a slice, whatever the number of ranks.
//
// In place, and without generations: only the owner of a slice reads it in other replicas or writes it there, between
// the two meetings of a piece, and in these a rank stages and reads nothing. A thread stages anew what the same thread
// has read. Slices are whatever the switch returned: scale and residual come after them, with no rounding between.
#pragma once

#include "cuda_fusion/barrier.h"
#include "cuda_fusion/row.h"

namespace pt::cuda_fusion {
namespace {

// Multimem: DeviceMultimem (device_multimem.cuh) or HostMultimem (host_multimem.h).
//   sum<Type>(channel, at)    the sum over ranks of vector `at` of the replicas, rounded to Type
//   store(channel, at, v)     to all replicas
//   fence()                   between accesses through the replica's address and through the multicast address
template <typename Memory, typename Multimem, typename Type>
class Nvls {
 public:
  template <typename Team>
  static PT_HOST_DEVICE void run(const Channel& channel, const Call& call, Team& team) {
    const uint32_t first_epoch = channel.control->staged_epoch + 1;
    Waiter<Memory> waiter(channel, Algorithm::kNvls, first_epoch);
    for (uint32_t piece = 0; piece < call.num_pieces; ++piece) {
      const uint32_t epoch = first_epoch + piece;
      const uint64_t first = piece * call.piece_rows;
      const uint64_t last = first + call.piece_rows < call.rows ? first + call.piece_rows : call.rows;
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        Vector* staged = channel.replica + (row - first) * call.row_vectors;
        for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
          staged[c] = load_vector<Type>(call, call.x, row, c);
        }
      }
      Multimem::fence();
      if (meet_peers(channel, team, waiter, Phase::kFirst, epoch)) reduce(channel, call, team, first, last);
      Multimem::fence();
      const bool alive = meet_peers(channel, team, waiter, Phase::kSecond, epoch);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        const Vector* reduced = channel.replica + (row - first) * call.row_vectors;
        float squares = 0.0f;
        for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
          float sums[kPerVector<Type>];
          if (alive) start<Type>(sums, reduced[c]);
          const Vector h = alive ? finish_sum<Type>(call, row, c, sums) : filled(0);
          squares = add(squares, store_h<Type>(call, row, c, h));
        }
        if (call.num_gammas != 0) norm_row<Type>(call, team, row, squares);
      }
      waiter.next_epoch();
    }
    finish_pieces<Memory>(channel.control, team, call.num_pieces);
  }

 private:
  // The own slice of each of the block's rows, as one range: a slice alone would keep few threads busy, and the way to
  // the switch and back is long.
  template <typename Team>
  static PT_HOST_DEVICE void reduce(const Channel& channel, const Call& call, Team& team, uint64_t first,
                                    uint64_t last) {
    const uint32_t slice = (call.row_vectors + channel.size - 1) / channel.size;
    const auto rows = static_cast<uint32_t>(last - first);
    const uint32_t own_rows = (rows + team.num_blocks() - 1 - team.block()) / team.num_blocks();
    for (uint32_t i = team.thread(); i < own_rows * slice; i += team.size()) {
      const uint32_t row = team.block() + i / slice * team.num_blocks();
      const uint32_t c = channel.rank * slice + i % slice;
      if (c >= call.vectors_in<Type>(first + row)) continue;
      const uint64_t at = static_cast<uint64_t>(row) * call.row_vectors + c;
      Multimem::store(channel, at, Multimem::template sum<Type>(channel, at));
    }
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
