// SPDX-License-Identifier: Apache-2.0
// Steps, flags and bounded waiting. Invariant: the epochs of two ranks differ by at most one (see README.md).
#include <sched.h>

#include <algorithm>
#include <cerrno>

#include "track_fusion/futex.h"
#include "track_fusion/group.h"

namespace pt::track_fusion {
namespace {

using Clock = std::chrono::steady_clock;

// After spinning: give the core away this long before sleeping in the kernel.
constexpr double kYieldSeconds = 200e-6;
// First nap short, so that the usual wait of a decode step never pays for a liveness check; then the longest nap, which
// bounds how late a dead peer is noticed.
constexpr double kFirstNapSeconds = 5e-3;
constexpr double kNapSeconds = 50e-3;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Modular: the counter wraps.
inline bool reached(uint32_t seen, uint32_t wanted) { return static_cast<int32_t>(seen - wanted) >= 0; }

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

void Group::begin_step() {
  // A peer that has posted `epoch_` has read everything of the step before; that is the generation written next.
  for (int peer = 0; peer < size_; ++peer) await_epoch(peer, epoch_);
  step_ = epoch_ + 1;
  own_calls_[step_ % kGenerations] = record_;
  flag(rank_).calls[step_ % kGenerations] = record_;
}

void Group::post() {
  epoch_ = step_;
  RankFlag& own = flag(rank_);
  // seq_cst on both sides: either we see the sleeper, or its FUTEX_WAIT sees the new epoch and does not sleep.
  own.epoch.store(epoch_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(own.epoch);
}

void Group::await_all() {
  for (int peer = 0; peer < size_; ++peer) await_epoch(peer, epoch_);
}

void Group::await_epoch(int peer, uint32_t epoch) {
  if (peer == rank_) return;
  if (!reached(seen_[peer], epoch)) reach(peer, epoch, call_timeout_s_, false);
  if (verified_[peer] != epoch) verify_call(peer, epoch);
}

bool Group::reach(int peer, uint32_t epoch, double timeout_s, bool soft) {
  const std::atomic<uint32_t>& word = flag(peer).epoch;
  for (int spin = 0; spin < spin_limit_; ++spin) {
    const uint32_t seen = word.load(std::memory_order_acquire);
    if (reached(seen, epoch)) {
      seen_[peer] = seen;
      return true;
    }
    pause_cpu();
  }
  return wait_slowly(peer, epoch, timeout_s, soft);
}

bool Group::wait_slowly(int peer, uint32_t epoch, double timeout_s, bool soft) {
  const auto start = Clock::now();
  bool interrupted = false;
  for (;;) {
    const uint32_t seen = flag(peer).epoch.load(std::memory_order_acquire);
    if (reached(seen, epoch)) {
      seen_[peer] = seen;
      return true;
    }
    if (header().abort_state.load(std::memory_order_acquire) != AbortState::kNone) throw aborted_by_peer();
    const double waited_s = seconds_since(start);
    if (waited_s < kYieldSeconds) {
      ::sched_yield();
      continue;
    }
    if (waited_s >= kFirstNapSeconds) check_peers(peer, epoch, waited_s);
    if (timeout_s > 0 && waited_s >= timeout_s) {
      if (soft) return false;
      fail_waiting(PT_TIMEOUT, peer, waited_s,
                   info(peer).state.load(std::memory_order_acquire) == AttachState::kAttached
                       ? "the process is alive but did not arrive"
                       : "it has not attached yet");
    }
    if (soft && interrupted) return false;
    double nap_s = waited_s < kFirstNapSeconds ? kFirstNapSeconds : kNapSeconds;
    if (timeout_s > 0) nap_s = std::min(nap_s, timeout_s - waited_s);
    RankFlag& other = flag(peer);
    other.sleepers.fetch_add(1, std::memory_order_seq_cst);
    interrupted = futex_wait(other.epoch, seen, nap_s) == EINTR;
    other.sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
}

void Group::verify_call(int peer, uint32_t epoch) {
  const CallRecord& theirs = flag(peer).calls[epoch % kGenerations];
  const CallRecord& ours = own_calls_[epoch % kGenerations];
  verified_[peer] = epoch;
  if (ours == theirs) return;
  fail(PT_MISMATCH, "ranks diverged at call %llu: rank %d (pid %d) called %s, rank %d (pid %d) called %s",
       static_cast<unsigned long long>(call_), rank_, pid(rank_), describe(ours).c_str(), peer, pid(peer),
       describe(theirs).c_str());
}

// `peer` is the one being waited for, but any dead member ends the wait: the group can never complete again.
void Group::check_peers(int peer, uint32_t epoch, double waited_s) {
  for (int other = 0; other < size_; ++other) {
    if (other == rank_) continue;
    const AttachState state = info(other).state.load(std::memory_order_acquire);
    if (state == AttachState::kClosed) {
      // A rank that is done may leave; only a step that still needs it fails. Its last post came before it closed.
      if (other == peer && !reached(flag(peer).epoch.load(std::memory_order_acquire), epoch)) {
        if (header().abort_state.load(std::memory_order_acquire) != AbortState::kNone) throw aborted_by_peer();
        fail_waiting(PT_PEER_LOST, peer, waited_s, "it has closed the group");
      }
      continue;
    }
    if (state != AttachState::kAttached) continue;
    if (!watches_[other]) watches_[other].emplace(ProcessIdentity{pid(other), info(other).start_time});
    if (watches_[other]->is_gone()) fail_waiting(PT_PEER_LOST, other, waited_s, "the process is gone");
  }
}

void Group::fail_waiting(pt_status status, int peer, double waited_s, const char* why) {
  fail(status, "rank %d waited %.1f s for rank %d (pid %d, call %llu) in %s: %s%s", rank_, waited_s, peer, pid(peer),
       static_cast<unsigned long long>(call_), describe(record_).c_str(), why, missing_peers(peer, step_).c_str());
}

std::string Group::missing_peers(int except, uint32_t epoch) const {
  std::string text;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer == rank_ || peer == except || reached(flag(peer).epoch.load(std::memory_order_acquire), epoch)) continue;
    text += format_text("%s rank %d (pid %d)", text.empty() ? "; also missing:" : ",", peer, pid(peer));
  }
  return text;
}

bool Group::poll(int peer, double timeout_s) {
  const BusyGuard guard(busy_);
  record_ = CallRecord{.operation = Operation::kPoll};
  check_healthy();
  PT_REQUIRE(peer >= 0 && peer < size_ && peer != rank_, "poll: peer is %d, expected another rank of 0 to %d", peer,
             size_ - 1);
  if (reached(seen_[peer], epoch_ + 1)) return true;
  try {
    return reach(peer, epoch_ + 1, timeout_s < 0 ? timeout_s_ : timeout_s, true);
  } catch (const Error& error) {
    poison(error);
    throw;
  }
}

}  // namespace pt::track_fusion
