// SPDX-License-Identifier: Apache-2.0
// Block b of a rank meets block b of every other rank: what these blocks wrote before is visible to them after. Flags
// are epochs, so that nothing is ever reset and a stale flag is always an older one.
#pragma once

#include "cuda_fusion/wait.h"

namespace pt::cuda_fusion {
namespace {

// Modular: the counter wraps.
PT_HOST_DEVICE bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

// True on all threads of the block or on none.
template <typename Memory, typename Team>
PT_HOST_DEVICE bool meet_peers(const Channel& channel, Team& team, Waiter<Memory>& waiter, Phase phase,
                               uint32_t epoch) {
  team.sync();  // the stores of the whole block come before the flags
  const uint64_t mine = Layout::signal(phase, team.block(), channel.rank);
  // A block that gave up left work undone: peers must not take its flag for done, they will see the abort.
  for (uint32_t peer = team.thread(); peer < channel.size && waiter.alive(); peer += team.size()) {
    Memory::store_release(channel.at<uint32_t>(peer, mine), epoch);
  }
  waiter.restart();
  for (uint32_t peer = team.thread(); peer < channel.size; peer += team.size()) {
    const uint32_t* flag = channel.at<uint32_t>(channel.rank, Layout::signal(phase, team.block(), peer));
    while (!reached(Memory::load_acquire(flag), epoch) && waiter.keep_waiting(peer, phase)) {
    }
  }
  const bool alive = team.all(waiter.alive());
  if (!alive) waiter.fail();
  return alive;
}

// Once per kernel: the last block to finish counts the pieces.
template <typename Memory, typename Team>
PT_HOST_DEVICE void finish_pieces(Control* control, Team& team, uint32_t num_pieces) {
  team.sync();
  if (team.thread() != 0 || Memory::arrive(&control->staged_arrived) + 1 != team.num_blocks()) return;
  control->staged_arrived = 0;
  control->staged_epoch += num_pieces;
}

}  // namespace
}  // namespace pt::cuda_fusion
