// SPDX-License-Identifier: Apache-2.0
// What a rank is told when another one is late, wrong or dead.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

#include "check.h"

using namespace pt;
using namespace pt::track_fusion;

namespace {

void a_late_rank_is_named_as_alive() {
  testing::run_ranks(2, 4096, 0.2, [](Group& group, int rank) {
    if (rank == 1) return;
    const Error error = testing::caught([&] { group.barrier(-1); });
    CHECK(error.status() == PT_TIMEOUT);
    CHECK_CONTAINS(error.what(), "for rank 1 (pid ");
    CHECK_CONTAINS(error.what(), "call 1) in barrier: the process is alive but did not arrive");
    const Error later = testing::caught([&] { group.barrier(-1); });
    CHECK(later.status() == PT_TIMEOUT);
    CHECK_CONTAINS(later.what(), "failed earlier");
  });
}

void different_calls_are_a_mismatch() {
  testing::run_ranks(2, 4096, 60.0, [](Group& group, int rank) {
    float x[4] = {};
    const Error error = testing::caught([&] {
      if (rank == 0) group.broadcast(x, 16, 0, -1);
      if (rank == 1) group.all_reduce(x, x, 4, PT_FLOAT32, -1);
      group.barrier(-1);
    });
    CHECK(error.status() == PT_MISMATCH || error.status() == PT_ABORTED);
    CHECK_CONTAINS(error.what(), "broadcast(16 bytes, root 0)");
    CHECK_CONTAINS(error.what(), "all_reduce(float32 [4])");
  });
}

void an_abort_ends_an_unlimited_wait() {
  testing::run_ranks(2, 4096, 60.0, [](Group& group, int rank) {
    if (rank == 1) {
      ::usleep(100000);
      group.abort("the operator said so");
      return;
    }
    const Error error = testing::caught([&] { group.barrier(0); });
    CHECK(error.status() == PT_ABORTED);
    CHECK_CONTAINS(error.what(), "rank 1 aborted the group: the operator said so");
  });
}

void a_closed_rank_is_lost() {
  testing::run_ranks(2, 4096, 60.0, [](Group& group, int rank) {
    group.barrier(-1);
    if (rank == 1) {
      group.close();
      return;
    }
    const Error error = testing::caught([&] { group.barrier(0); });
    CHECK(error.status() == PT_PEER_LOST);
    CHECK_CONTAINS(error.what(), "it has closed the group");
  });
}

void polling_does_no_harm() {
  std::atomic<bool> polled = false;
  testing::run_ranks(2, 4096, 60.0, [&](Group& group, int rank) {
    if (rank == 1) {
      CHECK(!group.poll(0, 0.05));
      polled = true;
    }
    while (!polled) ::usleep(1000);
    int value = rank == 0 ? 42 : 0;
    if (rank == 1) {
      while (!group.poll(0, 0.05)) {
      }
    }
    group.broadcast(&value, sizeof(value), 0, 0);
    CHECK(value == 42);
  });
}

// A zombie counts as dead, by pidfd and by /proc alike.
void a_dead_child_is_gone() {
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  ProcessIdentity identity = {child, 0};
  const PeerWatch by_pidfd(identity), by_proc(identity, false);
  CHECK(!by_pidfd.is_gone() && !by_proc.is_gone());
  identity.start_time = 1;
  CHECK(PeerWatch(identity).is_gone());  // same pid, other process
  ::kill(child, SIGKILL);
  siginfo_t info;
  ::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT);  // dead, not reaped
  CHECK(by_pidfd.is_gone() && by_proc.is_gone());
  ::waitpid(child, nullptr, 0);
  CHECK(by_pidfd.is_gone() && by_proc.is_gone());
}

void the_name_goes_with_the_last_rank() {
  const auto group = Group::create(2, 4096, 1.0);
  CHECK(::access(("/dev/shm" + group->name()).c_str(), F_OK) == 0);
  const auto other = Group::attach(group->name(), 1, 2, 1.0);
  CHECK(::access(("/dev/shm" + group->name()).c_str(), F_OK) != 0);
  const Error error = testing::caught([&] { Group::attach(group->name(), 1, 2, 1.0); });
  CHECK(error.status() == PT_SYSTEM_ERROR);
}

void a_wrong_segment_is_refused() {
  const auto group = Group::create(3, 4096, 1.0);
  auto* header = reinterpret_cast<Header*>(group->segment()->data());
  const auto attach = [&](int rank, int size) {
    return testing::caught([&] { Group::attach(group->name(), rank, size, 1.0); });
  };
  CHECK_CONTAINS(attach(1, 2).what(), "is a group of 3 ranks, expected 2");
  CHECK_CONTAINS(attach(3, 3).what(), "rank is 3, expected 1 to 2");
  CHECK_CONTAINS(attach(0, 3).what(), "rank 0 creates the group");
  header->layout_version = 99;
  CHECK_CONTAINS(attach(1, 3).what(), "has layout version 99, expected 1");
  header->layout_version = kLayoutVersion;
  header->capacity_bytes = 8192;
  CHECK_CONTAINS(attach(1, 3).what(), "expected ");
  header->capacity_bytes = 4096;
  header->magic = 1;
  CHECK_CONTAINS(attach(1, 3).what(), "is not a track fusion segment");
  header->magic = kMagic;
  const auto first = Group::attach(group->name(), 1, 3, 1.0);
  CHECK_CONTAINS(attach(1, 3).what(), "is already taken by pid");
}

void an_unknown_instruction_set_is_refused() {
  ::setenv("PT_TRACK_FUSION_ISA", "mmx", 1);
  const Error error = testing::caught([] { Group::create(1, 4096, 1.0); });
  ::unsetenv("PT_TRACK_FUSION_ISA");
  CHECK(error.status() == PT_UNSUPPORTED);
  CHECK_CONTAINS(error.what(), "PT_TRACK_FUSION_ISA is 'mmx', this build has: baseline");
}

}  // namespace

int main() {
  a_dead_child_is_gone();  // forks: before any thread exists
  the_name_goes_with_the_last_rank();
  a_wrong_segment_is_refused();
  an_unknown_instruction_set_is_refused();
  a_late_rank_is_named_as_alive();
  different_calls_are_a_mismatch();
  an_abort_ends_an_unlimited_wait();
  a_closed_rank_is_lost();
  polling_does_no_harm();
}
