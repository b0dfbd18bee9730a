// SPDX-License-Identifier: Apache-2.0
// Small messages: every rank pushes its message into an inbox of every rank, and whoever reads "not yet arrived" reads
// again. One hop, no flags, no barrier.
//
// Call k uses generation k % 3 and fills the inboxes of call k - 1 with the sentinel again. That is safe because a peer
// is at most one call ahead: to finish call k + 1 it needs what this rank pushes there, after its call k has ended. So
// nobody pushes into generation (k - 1) % 3 = (k + 2) % 3 before it is clean. With two generations that argument fails.
#pragma once

#include "cuda_fusion/row.h"
#include "cuda_fusion/wait.h"

namespace pt::cuda_fusion {
namespace {

// kRanks: 2, 4, 8, or 0 for any number. kNumGenerations differs from 3 only in tests that want to see it fail.
template <typename Memory, typename Type, int kRanks, uint32_t kNumGenerations = kGenerations>
class OneShot {
 public:
  template <typename Team>
  static PT_HOST_DEVICE void run(const Channel& channel, const Call& call, Team& team) {
    Control* control = channel.control;
    const uint32_t generation = control->one_shot_generation;
    Waiter<Memory> waiter(channel, Algorithm::kOneShot, control->one_shot_epoch);
    push(channel, call, team, channel.layout.inbox(generation));
    clear(channel, team, (generation + kNumGenerations - 1) % kNumGenerations, control->one_shot_clear);
    for (uint64_t row = team.block(); row < call.rows; row += team.num_blocks()) {
      float squares = 0.0f;
      for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
        Vector h = filled(0);
        float sums[kPerVector<Type>] = {};
        if (collect(channel, waiter, channel.layout.inbox(generation), row * call.row_vectors + c,
                    call.rows * call.row_vectors, sums)) {
          h = finish_sum<Type>(call, row, c, sums);
        }
        squares = add(squares, store_h<Type>(call, row, c, h));
      }
      if (call.num_gammas != 0) norm_row<Type>(call, team, row, squares);
    }
    if (channel.strict) Memory::fence();
    finish(channel, call, team, generation);
  }

 private:
  static PT_HOST_DEVICE uint32_t num_ranks(const Channel& channel) { return kRanks != 0 ? kRanks : channel.size; }

  template <typename Team>
  static PT_HOST_DEVICE void push(const Channel& channel, const Call& call, Team& team, uint64_t inbox) {
    const uint32_t n = num_ranks(channel);
    const uint64_t slot = call.rows * call.row_vectors;
    for (uint64_t row = team.block(); row < call.rows; row += team.num_blocks()) {
      for (uint32_t c = team.thread(); c < call.vectors_in<Type>(row); c += team.size()) {
        const Vector mine = without_sentinel(load_vector<Type>(call, call.x, row, c));
        const uint64_t at = channel.rank * slot + row * call.row_vectors + c;
        // Starting with the own inbox: at any time every rank writes to another one.
        for (uint32_t step = 0; step < n; ++step) {
          const uint32_t peer = channel.rank + step < n ? channel.rank + step : channel.rank + step - n;
          Memory::store_relaxed(channel.at<Vector>(peer, inbox) + at, mine);
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

  // The sum over ranks of one vector, in rank order. False: gave up.
  static PT_HOST_DEVICE bool collect(const Channel& channel, Waiter<Memory>& waiter, uint64_t inbox, uint64_t at,
                                     uint64_t slot, float* sums) {
    constexpr uint32_t kBatch = kRanks != 0 ? kRanks : 1;
    const uint32_t n = num_ranks(channel);
    const Vector* mine = channel.at<Vector>(channel.rank, inbox) + at;
    for (uint32_t first = 0; first < n; first += kBatch) {
      Vector words[kBatch];
      waiter.restart();
      for (;;) {
        uint32_t missing = n;
        PT_UNROLL
        for (uint32_t i = 0; i < kBatch; ++i) words[i] = Memory::load_relaxed(mine + (first + i) * slot);
        PT_UNROLL
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (has_sentinel(words[i]) && missing == n) missing = first + i;
        }
        if (missing == n) break;
        if (!waiter.keep_waiting(missing, Phase::kFirst)) return false;
      }
      if (channel.strict) Memory::fence();
      if (first == 0) start<Type>(sums, words[0]);
      PT_UNROLL
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (first + i != 0) accumulate<Type>(sums, words[i]);
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
