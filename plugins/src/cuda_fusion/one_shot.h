// SPDX-License-Identifier: Apache-2.0
// Small messages: every rank pushes its message into an inbox of every rank, and whoever reads "not yet arrived" reads
// again. One hop, no flags, no barrier.
//
// Call k uses generation k % 3 and fills the inboxes of call k - 1 with the sentinel again. That is safe because a peer
// is at most one call ahead: to finish call k + 1 it needs what this rank pushes there, after its call k has ended. So
// nobody pushes into generation (k - 1) % 3 = (k + 2) % 3 before it is clean. With two generations that argument fails.
#pragma once

#include "cuda_fusion/payload.h"
#include "cuda_fusion/wait.h"

namespace pt::cuda_fusion {
namespace {

// kRanks: 8, or 0 for any number. kNumGenerations differs from 3 only in tests that want to see it fail.
template <typename Memory, typename Payload, int kRanks, uint32_t kNumGenerations = kGenerations>
class OneShot {
 public:
  template <typename Team>
  static PT_HOST_DEVICE void run(const Channel& channel, const Call& call, Team& team) {
    Control* control = channel.control;
    const uint32_t generation = control->one_shot_generation;
    Waiter<Memory> waiter(channel, Algorithm::kOneShot, control->one_shot_epoch);
    push(channel, call, team, channel.layout.inbox(generation));
    clear(channel, team, (generation + kNumGenerations - 1) % kNumGenerations, control->one_shot_clear);
    const Vector* inbox = channel.at<Vector>(channel.rank, channel.layout.inbox(generation));
    for (uint64_t row = team.block(); row < call.rows; row += team.num_blocks()) {
      float squares = 0.0f;
      for (uint32_t c = team.thread(); c < Payload::packets(call, row); c += team.size()) {
        float sums[Payload::kValues] = {};
        const bool arrived = collect(channel, call, waiter, inbox + row * call.row_vectors, c, sums);
        squares = add(squares, store_packet<Payload>(call, row, c, sums, arrived));
      }
      if (call.num_gammas != 0) norm_row<typename Payload::Type>(call, team, row, squares);
    }
    if (channel.strict) Memory::fence();
    finish(channel, call, team, generation);
  }

 private:
  using Inbox = Polled<Memory>;

  static PT_HOST_DEVICE uint32_t num_ranks(const Channel& channel) { return kRanks != 0 ? kRanks : channel.size; }

  template <typename Team>
  static PT_HOST_DEVICE void push(const Channel& channel, const Call& call, Team& team, uint64_t inbox) {
    const uint32_t n = num_ranks(channel);
    const uint64_t slot = call.rows * call.row_vectors;
    for (uint64_t row = team.block(); row < call.rows; row += team.num_blocks()) {
      const uint32_t packets = Payload::packets(call, row);
      // Threads that make packets together stay together, past the end of the row as well.
      for (uint32_t c = team.thread(); c - c % Payload::kLanes < packets; c += team.size()) {
        const typename Payload::Packet mine = Payload::make(call, row, c);
        if (c >= packets) continue;
        const uint64_t at = channel.rank * slot + row * call.row_vectors;
        // Starting with the own inbox: at any time every rank writes to another one.
        for (uint32_t step = 0; step < n; ++step) {
          const uint32_t peer = channel.rank + step < n ? channel.rank + step : channel.rank + step - n;
          Payload::template store<Inbox>(call, channel.at<Vector>(peer, inbox) + at, c, mine);
        }
      }
    }
  }

  template <typename Team>
  static PT_HOST_DEVICE void clear(const Channel& channel, Team& team, uint32_t generation, uint32_t count) {
    Vector* inbox = channel.at<Vector>(channel.rank, channel.layout.inbox(generation));
    const uint32_t stride = team.num_blocks() * team.size();
    for (uint32_t i = team.block() * team.size() + team.thread(); i < count; i += stride) {
      Memory::store_relaxed(inbox + i, filled(kSentinel));
    }
  }

  // The sums over ranks of one packet's values, in rank order. False: gave up.
  static PT_HOST_DEVICE bool collect(const Channel& channel, const Call& call, Waiter<Memory>& waiter,
                                     const Vector* row_at, uint32_t c, float* sums) {
    constexpr uint32_t kBatch = kRanks != 0 ? kRanks : kPacketsAtOnce;
    const uint32_t n = num_ranks(channel);
    const uint64_t slot = call.rows * call.row_vectors;
    for (uint32_t first = 0; first < n; first += kBatch) {
      typename Payload::Packet packets[kBatch] = {};
      waiter.restart();
      for (;;) {
        uint32_t missing = n;
        PT_UNROLL
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (first + i < n) packets[i] = Payload::template load<Inbox>(call, row_at + (first + i) * slot, c);
        }
        PT_UNROLL
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (first + i < n && Payload::is_missing(packets[i]) && missing == n) missing = first + i;
        }
        if (missing == n) break;
        if (!waiter.keep_waiting(missing, Phase::kFirst)) return false;
      }
      if (channel.strict) Memory::fence();
      PT_UNROLL
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (first + i < n) add_packet<Payload>(call, packets[i], first + i, c, sums);
      }
    }
    return true;
  }

  // The last block to finish advances the counters: by then all have read them.
  template <typename Team>
  static PT_HOST_DEVICE void finish(const Channel& channel, const Call& call, Team& team, uint32_t generation) {
    Control* control = channel.control;
    const uint64_t left = channel.size * call.rows * call.row_vectors;
    team.sync();
    if (team.thread() != 0 || Memory::arrive(&control->one_shot_arrived) + 1 != team.num_blocks()) return;
    control->one_shot_arrived = 0;
    control->one_shot_generation = (generation + 1) % kNumGenerations;
    control->one_shot_clear = static_cast<uint32_t>(left);
    ++control->one_shot_epoch;
  }
};

}  // namespace
}  // namespace pt::cuda_fusion
