// SPDX-License-Identifier: Apache-2.0
// Ranks that do not arrive, and protocols that are known to be wrong: the tests of the right ones must be able to fail.
#include "fusion_world.h"

using namespace pt;
using namespace pt::testing;
using Type = numeric::Float32;

namespace {

constexpr uint32_t kVectors = 8;
constexpr Layout kSmall = {2, 4096, 8192};
// Of waits in vain: long beside any pause of a rank that does come.
constexpr double kInVain = 2.0;
constexpr double kPatient = 60.0;

thread_local int this_rank = -1;

// Rank 0 takes its time before it clears.
struct SlowClear : HostMemory {
  using HostMemory::store_relaxed;
  static void store_relaxed(Vector* to, const Vector& v) {
    if (this_rank == 0 && has_sentinel(v)) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    HostMemory::store_relaxed(to, v);
  }
};

// Flags that order nothing: for ThreadSanitizer to object to.
struct RelaxedFlags : HostMemory {
  static void store_release(uint32_t* to, uint32_t value) { HostMemory::store_relaxed(to, value); }
  static uint32_t load_acquire(const uint32_t* from) { return HostMemory::load_relaxed(from); }
};

struct Message {
  std::vector<float> x = std::vector<float>(kVectors * 4);
  std::vector<float> h = std::vector<float>(kVectors * 4, 77.0f);

  Call call(int rank) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(rank + 1);
    Call made = {};
    made.x = x.data();
    made.h = h.data();
    made.elements = x.size();
    made.rows = made.piece_rows = made.num_pieces = 1;
    made.row_elements = x.size();
    made.row_vectors = kVectors;
    made.slice_elements = kVectors / 2 * 4;
    made.slice_vectors = kVectors / 2;
    made.scale = 1.0f;
    made.aligned = reinterpret_cast<uintptr_t>(x.data()) % 16 == 0 && reinterpret_cast<uintptr_t>(h.data()) % 16 == 0;
    return made;
  }
  bool all(float value) const {
    return std::all_of(h.begin(), h.end(), [&](float found) { return found == value; });
  }
};

// Calls with the right result on both ranks, until the first failure or `calls`.
template <typename Protocol>
int good_calls(int calls, double timeout_s) {
  FusionWorld world(2, 1, 1, kSmall, timeout_s);
  int good[2] = {0, 0};
  world.run([&](int rank, HostTeam& team, const auto&) {
    this_rank = rank;
    Message message;
    while (good[rank] < calls) {
      const Call call = message.call(rank);
      Protocol::run(world.channel(rank), call, team);
      if (world.record(rank).ready != 0 || !message.all(3.0f)) break;
      ++good[rank];
    }
  });
  return std::min(good[0], good[1]);
}

void three_generations_survive_a_slow_clear_and_two_do_not() {
  constexpr int kCalls = 12;
  CHECK((good_calls<OneShot<SlowClear, Plain<Type>, 2, 3>>(kCalls, kPatient)) == kCalls);
  CHECK((good_calls<OneShot<SlowClear, Plain<Type>, 2, 2>>(kCalls, kInVain)) < kCalls);
  CHECK((good_calls<OneShot<SlowClear, Plain<Type>, 2, 1>>(kCalls, kInVain)) < kCalls);
}

template <typename Protocol>
void absent_rank_is_named(Algorithm algorithm) {
  FusionWorld world(4, 2, 2, {4, 4096, 8192}, kInVain);
  world.run([&](int rank, HostTeam& team, const auto& kernel_boundary) {
    static Message messages[4];
    static Call calls[4];
    if (rank == 2) return;  // never comes
    if (kernel_boundary()) calls[rank] = messages[rank].call(rank);
    kernel_boundary();
    Protocol::run(world.channel(rank), calls[rank], team);
    if (kernel_boundary()) CHECK(messages[rank].all(0.0f));
  });
  int timeouts = 0;
  for (const int rank : {0, 1, 3}) {
    const Record& record = world.record(rank);
    CHECK(record.ready == 1 && record.rank == static_cast<uint32_t>(rank) && record.algorithm == algorithm);
    CHECK(record.epoch == kFirstEpoch + (algorithm == Algorithm::kOneShot ? 0 : 1));
    CHECK(record.failure == Failure::kTimeout || record.failure == Failure::kAborted);
    if (record.failure == Failure::kTimeout) ++timeouts;
    if (record.failure == Failure::kTimeout) CHECK(record.peer == 2);
    if (record.failure == Failure::kAborted) CHECK(record.peer != 2);
  }
  CHECK(timeouts >= 1);
  CHECK(world.channel(2).header(2)->abort != 0);  // and the absent one will know when it comes
}

// Rank 2 stages its message and signals it by hand, or does so to rank 1 alone, and is never seen again.
template <typename Protocol>
class Vanished {
 public:
  explicit Vanished(bool at_all) : world_(3, 1, 2, {3, 4096, 8192}, kInVain) {
    std::fill_n(world_.channel(2).replica, kVectors, filled(0));
    world_.run([&](int rank, HostTeam& team, const auto& kernel_boundary) {
      if (kernel_boundary()) calls_[rank] = messages_[rank].call(rank);
      if (rank == 2 && kernel_boundary()) {
        for (const uint32_t peer : {0, 1}) {
          if (peer == 1 || at_all) signal(Phase::kFirst, peer);
        }
        signal(Phase::kSecond, 1);
      }
      kernel_boundary();
      if (rank != 2) Protocol::run(world_.channel(rank), calls_[rank], team);
    });
  }
  const Record& record(int rank) const { return world_.record(rank); }
  bool gave_zeros(int rank) const { return messages_[rank].all(0.0f); }

 private:
  void signal(Phase phase, uint32_t peer) {
    HostMemory::store_release(world_.channel(2).at<uint32_t>(peer, Layout::signal(phase, 0, 2)), kFirstEpoch + 1);
  }
  FusionWorld world_;
  Message messages_[3];
  Call calls_[3];
};

template <typename Protocol>
void rank_that_vanishes_between_two_meetings_is_named() {
  const Vanished<Protocol> seen(true);
  const Record& record = seen.record(0);
  CHECK(record.ready == 1 && record.phase == Phase::kSecond && record.epoch == kFirstEpoch + 1);
  CHECK(record.failure == Failure::kTimeout ? record.peer == 2 : record.peer == 1);
  CHECK(seen.gave_zeros(0));
}

// Rank 0 waits in vain for the first meeting and does no more work. Rank 1, whose meeting was complete, must not take
// what lies in rank 0's slice for a sum.
template <typename Protocol>
void work_that_was_given_up_is_not_taken_for_done() {
  const Vanished<Protocol> seen(false);
  for (const int rank : {0, 1}) CHECK(seen.record(rank).ready == 1 && seen.gave_zeros(rank));
}

// Without a wait, so without a limit that could tell it.
template <typename Protocol>
void a_rank_that_comes_after_the_end_learns_of_it() {
  FusionWorld world(2, 1, 2, kSmall, kPatient);
  world.channel(1).header(1)->abort = 1;  // by rank 0
  Message message;
  const Call call = message.call(1);
  world.run([&](int rank, HostTeam& team, const auto&) {
    if (rank == 1) Protocol::run(world.channel(1), call, team);
  });
  const Record& record = world.record(1);
  CHECK(record.ready == 1 && record.failure == Failure::kAborted && record.rank == 1 && record.peer == 0);
  CHECK(message.all(0.0f));
}

void host_can_abort_a_waiting_rank() {
  FusionWorld world(2, 1, 1, kSmall, kPatient);
  world.run([&](int rank, HostTeam& team, const auto&) {
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      HostMemory::store_relaxed(&world.channel(0).record->abort_request, 1u);
      return;
    }
    Message message;
    OneShot<HostMemory, Plain<Type>, 2>::run(world.channel(0), message.call(0), team);
    CHECK(message.all(0.0f));
  });
  CHECK(world.record(0).ready == 1 && world.record(0).failure == Failure::kAborted);
}

void memory_without_a_header_is_not_waited_for() {
  FusionWorld world(2, 1, 1, kSmall, kPatient);
  world.channel(0).header(0)->magic = 0;
  world.run([&](int rank, HostTeam& team, const auto&) {
    if (rank != 0) return;
    Message message;
    TwoShot<HostMemory, Plain<Type>, 2>::run(world.channel(0), message.call(0), team);
    CHECK(message.all(0.0f));
  });
  CHECK(world.record(0).ready == 1 && world.record(0).failure == Failure::kNotConnected);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {  // under ThreadSanitizer only
    if (std::strcmp(argv[1], "nvls") == 0) good_calls<Nvls<RelaxedFlags, HostMultimem, Type>>(50, kPatient);
    if (std::strcmp(argv[1], "pull") == 0) good_calls<Pull<RelaxedFlags, Plain<Type>>>(50, kPatient);
    return 0;
  }
  three_generations_survive_a_slow_clear_and_two_do_not();
  absent_rank_is_named<OneShot<HostMemory, Plain<Type>, 4>>(Algorithm::kOneShot);
  absent_rank_is_named<Pull<HostMemory, Plain<Type>>>(Algorithm::kPull);
  absent_rank_is_named<TwoShot<HostMemory, Plain<Type>, 0>>(Algorithm::kTwoShot);
  absent_rank_is_named<Nvls<HostMemory, HostMultimem, Type>>(Algorithm::kNvls);
  rank_that_vanishes_between_two_meetings_is_named<TwoShot<HostMemory, Plain<Type>, 0>>();
  rank_that_vanishes_between_two_meetings_is_named<Nvls<HostMemory, HostMultimem, Type>>();
  work_that_was_given_up_is_not_taken_for_done<TwoShot<HostMemory, Plain<Type>, 0>>();
  work_that_was_given_up_is_not_taken_for_done<Nvls<HostMemory, HostMultimem, Type>>();
  a_rank_that_comes_after_the_end_learns_of_it<OneShot<HostMemory, Plain<Type>, 2>>();
  a_rank_that_comes_after_the_end_learns_of_it<Pull<HostMemory, Plain<Type>>>();
  a_rank_that_comes_after_the_end_learns_of_it<TwoShot<HostMemory, Plain<Type>, 0>>();
  a_rank_that_comes_after_the_end_learns_of_it<Nvls<HostMemory, HostMultimem, Type>>();
  host_can_abort_a_waiting_rank();
  memory_without_a_header_is_not_waited_for();
}
