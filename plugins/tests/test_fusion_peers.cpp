// SPDX-License-Identifier: Apache-2.0
// Set-up between ranks: file descriptors over Unix sockets, agreement on failures, the choice of an algorithm.
#include <fcntl.h>
#include <sys/mman.h>

#include "check.h"
#include "cuda_fusion/fd_exchange.h"
#include "cuda_fusion/limits.h"
#include "fusion_ranks.h"

using namespace pt;
using namespace pt::cuda_fusion;
using pt::testing::as_ranks;

namespace {

void descriptors_arrive_and_lead_to_the_senders_memory() {
  constexpr int kSize = 4;
  as_ranks(kSize, [](int rank, const Exchange& exchange) {
    const UniqueFd own(::memfd_create("pt-test", MFD_CLOEXEC));
    CHECK(own.valid());
    const int written = 1000 + rank;
    CHECK(::pwrite(own.get(), &written, sizeof(written), 0) == sizeof(written));
    const std::vector<UniqueFd> fds = exchange_fds(rank, kSize, own.get(), exchange, 20.0);
    for (int peer = 0; peer < kSize; ++peer) {
      const UniqueFd& fd = fds[static_cast<size_t>(peer)];
      CHECK(fd.valid() == (peer != rank));
      if (peer == rank) continue;
      int found = 0;
      CHECK(::pread(fd.get(), &found, sizeof(found), 0) == sizeof(found));
      CHECK(found == 1000 + peer);
      CHECK((::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    }
    exchange.barrier();  // before descriptors are closed
  });
}

void one_rank_may_be_the_only_one_to_give() {
  constexpr int kSize = 3;
  as_ranks(kSize, [](int rank, const Exchange& exchange) {
    const UniqueFd own(rank == 0 ? ::memfd_create("pt-test", MFD_CLOEXEC) : -1);
    const int written = 77;
    if (rank == 0) CHECK(::pwrite(own.get(), &written, sizeof(written), 0) == sizeof(written));
    const std::vector<UniqueFd> fds = exchange_fds(rank, kSize, own.get(), exchange, 20.0);
    int found = 0;
    for (int peer = 0; peer < kSize; ++peer) CHECK(fds[static_cast<size_t>(peer)].valid() == (peer == 0 && rank != 0));
    if (rank != 0) CHECK(::pread(fds[0].get(), &found, sizeof(found), 0) == sizeof(found) && found == written);
    exchange.barrier();
  });
}

void one_ranks_failure_is_everybodys() {
  as_ranks(3, [](int rank, const Exchange& exchange) {
    const Error error = testing::caught([&] {
      exchange.together([&] {
        if (rank == 1) throw Error(PT_SYSTEM_ERROR, "no memory here");
      });
    });
    CHECK(error.status() == PT_SYSTEM_ERROR);
    CHECK_CONTAINS(error.what(), "no memory here (rank 1)");
    CHECK(testing::caught([&] { exchange.together([] {}); }).status() == PT_OK);
  });
}

void the_choice_depends_on_what_all_ranks_know() {
  const Limits eight = Limits::defaults(8), two = Limits::defaults(2);
  const auto choose = [](const Limits& limits, int size, size_t bytes, bool residual, bool nccl) {
    return select_algorithm({size, bytes, limits.one_shot, false, false, residual, nccl}, limits);
  };
  CHECK(choose(eight, 8, 8192, false, false) == Algorithm::kOneShot);
  CHECK(choose(eight, 8, 262144, true, true) == Algorithm::kOneShot);
  CHECK(choose(eight, 8, 262160, false, true) == Algorithm::kTwoShot);
  CHECK(choose(eight, 8, 262160, true, true) == Algorithm::kPull);
  CHECK(choose(eight, 8, size_t{64} << 20, false, true) == Algorithm::kNccl);
  CHECK(choose(eight, 8, size_t{64} << 20, false, false) == Algorithm::kTwoShot);
  CHECK(choose(two, 2, size_t{1} << 20, false, true) == Algorithm::kPull);
  CHECK(choose(two, 2, size_t{64} << 20, false, true) == Algorithm::kNccl);
  // A channel may have less room than the default limit.
  CHECK(select_algorithm({2, 8192, 4096, false, false, false, false}, two) == Algorithm::kPull);
}

void nvls_is_never_chosen() {
  for (const int size : {1, 2, 3, 4, 8, 16}) {
    const Limits limits = Limits::defaults(size);
    for (size_t bytes = 16; bytes <= size_t{1} << 32; bytes *= 2) {
      for (int flags = 0; flags < 16; ++flags) {
        const Selection s = {
            size, bytes, limits.one_shot, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, (flags & 8) != 0};
        CHECK(select_algorithm(s, limits) != Algorithm::kNvls);
      }
    }
  }
}

}  // namespace

int main() {
  descriptors_arrive_and_lead_to_the_senders_memory();
  one_rank_may_be_the_only_one_to_give();
  one_ranks_failure_is_everybodys();
  the_choice_depends_on_what_all_ranks_know();
  nvls_is_never_chosen();
}
