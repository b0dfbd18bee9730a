// SPDX-License-Identifier: Apache-2.0
// Larger messages: every rank owns a slice of the columns of each row. Slices are pushed to their owners, blocks meet,
// the owner adds them and pushes the same bytes to everybody, itself included; blocks meet again.
//
// Two generations, as in pull.h, and no barrier at the end. Per link 2 (n - 1) / n of a message instead of n - 1. A
// slice travels like a row of its own length. Encoded sums are encoded once more: rounded twice, alike on all ranks.
#pragma once

#include "cuda_fusion/barrier.h"
#include "cuda_fusion/payload.h"

namespace pt::cuda_fusion {
namespace {

template <typename Memory, typename Payload, int kRanks>
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
      const Vector* totals = channel.at<Vector>(channel.rank, rows.gather_at);
      for (uint64_t row = first + team.block(); row < last; row += team.num_blocks()) {
        const Vector* row_at = totals + (row - first) * num_ranks(channel) * call.slice_vectors;
        float squares = 0.0f;
        for (uint32_t c = team.thread(); c < Payload::packets(call, row); c += team.size()) {
          typename Payload::Packet packet = {};
          if (alive) packet = Payload::template load_sliced<Staged>(call, row_at, c);
          squares = add(squares, Payload::store_total(call, row, c, packet, alive));
        }
        if (call.num_gammas != 0) norm_row<typename Payload::Type>(call, team, row, squares);
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
  static PT_HOST_DEVICE uint32_t slice_packets(const Call& call) { return call.slice_elements / Payload::kValues; }
  // Slices go round: rows may have fewer slices than there are ranks.
  static PT_HOST_DEVICE uint32_t owner_of(const Channel& channel, uint64_t row, uint32_t slice) {
    const uint32_t n = num_ranks(channel);
    return (slice + static_cast<uint32_t>(row) % n) % n;
  }
  static PT_HOST_DEVICE uint32_t own_slice(const Channel& channel, uint64_t row) {
    const uint32_t n = num_ranks(channel);
    return (channel.rank + n - static_cast<uint32_t>(row) % n) % n;
  }
  // Of a row's slice in the inbox of its owner. Room is that of a whole piece, even when this one is shorter.
  static PT_HOST_DEVICE uint64_t scattered_at(const Call& call, const Piece& piece, uint32_t source, uint64_t row) {
    return (source * call.piece_rows + row - piece.first) * call.slice_vectors;
  }

  template <typename Team>
  static PT_HOST_DEVICE void scatter(const Channel& channel, const Call& call, Team& team, const Piece& piece) {
    const Call slices = call.of_slices();
    for (uint64_t row = piece.first + team.block(); row < piece.last; row += team.num_blocks()) {
      const uint64_t at = scattered_at(call, piece, channel.rank, row);
      const uint32_t packets = Payload::packets(call, row);
      for (uint32_t c = team.thread(); c - c % Payload::kLanes < packets; c += team.size()) {
        const typename Payload::Packet mine = Payload::make(call, row, c);
        if (c >= packets) continue;
        const uint32_t slice = c / slice_packets(call);
        Vector* inbox = channel.at<Vector>(owner_of(channel, row, slice), piece.scatter_at);
        Payload::template store<Staged>(slices, inbox + at, c - slice * slice_packets(call), mine);
      }
    }
  }

  template <typename Team>
  static PT_HOST_DEVICE void reduce(const Channel& channel, const Call& call, Team& team, const Piece& piece) {
    constexpr uint32_t kBatch = kRanks != 0 ? kRanks : kPacketsAtOnce;
    const uint32_t n = num_ranks(channel);
    const Call slices = call.of_slices();
    const Vector* inbox = channel.at<Vector>(channel.rank, piece.scatter_at);
    // All rows of this block at once: one slice would keep few of its threads busy.
    const uint64_t behind = piece.last - piece.first + team.num_blocks() - 1 - team.block();
    const auto count = static_cast<uint32_t>(behind / team.num_blocks()) * slice_packets(call);
    for (uint32_t i = team.thread(); i < count; i += team.size()) {
      const uint32_t turn = i / slice_packets(call);
      const uint32_t s = i - turn * slice_packets(call);
      const uint64_t row = piece.first + team.block() + static_cast<uint64_t>(turn) * team.num_blocks();
      const uint32_t slice = own_slice(channel, row);
      const uint32_t c = slice * slice_packets(call) + s;
      const bool inside = c < Payload::packets(call, row);
      float sums[Payload::kValues] = {};
      if (inside) {
        add_ranks<Payload, kBatch>(call, n, c, sums, [&](uint32_t rank) {
          return Payload::template load<Staged>(slices, inbox + scattered_at(call, piece, rank, row), s);
        });
      }
      const typename Payload::Packet total = Payload::total(call, row, c, sums);
      if (!inside) continue;
      const uint64_t at = ((row - piece.first) * n + slice) * call.slice_vectors;
      for (uint32_t step = 0; step < n; ++step) {
        const uint32_t peer = channel.rank + step < n ? channel.rank + step : channel.rank + step - n;
        Payload::template store<Staged>(slices, channel.at<Vector>(peer, piece.gather_at) + at, s, total);
      }
    }
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
