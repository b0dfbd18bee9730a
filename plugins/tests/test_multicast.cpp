// SPDX-License-Identifier: Apache-2.0
// Multicast memory over a stand-in of the NVIDIA driver: what is called in which order by whom, and what is left
// behind.
#include <dlfcn.h>

#include "check.h"
#include "cuda_fusion/multicast.h"
#include "fake_driver.h"
#include "fusion_ranks.h"

using namespace pt;
using namespace pt::cuda_fusion;
using pt::testing::as_ranks;

namespace {

constexpr int kSize = 4;
constexpr size_t kStaging = (size_t{5} << 20) + 16;
constexpr size_t kReplica = size_t{6} << 20;

FakeDriver& driver() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  CHECK(library != nullptr);
  void* const found = ::dlsym(library, "fake_driver");
  CHECK(found != nullptr);  // or this is a real one
  return *reinterpret_cast<decltype(&fake_driver)>(found)();
}

Settings settings_of(int rank) {
  Settings settings = {};
  settings.rank = rank;
  settings.common.size = kSize;
  settings.common.layout.staging_bytes = kStaging;
  settings.common.timeout_s = 20.0;
  return settings;
}

// Opens on all ranks, each on the device of its number; they agree on the outcome, whose text is returned.
std::string opened_on_all(size_t replica_bytes) {
  std::string texts[kSize];
  as_ranks(kSize, [&](int rank, const Exchange& exchange) {
    const Error error = testing::caught([&] {
      Multicast memory(settings_of(rank), rank, exchange);
      CHECK(memory.replica() != nullptr && memory.address() != nullptr);
      exchange.barrier();
      if (rank == 0) CHECK(driver().bound_bytes == kSize * replica_bytes);
      exchange.barrier();
      memory.unmap();
      exchange.barrier();
    });
    texts[rank] = error.what();
  });
  for (const std::string& text : texts) CHECK(text == texts[0]);
  if (!driver().violation.empty()) std::fprintf(stderr, "%s\n", driver().violation.c_str());
  CHECK(driver().violation.empty());
  CHECK(driver().held == 0 && driver().bound_bytes == 0);
  return texts[0];
}

void all_ranks_get_a_replica_and_leave_nothing_behind() { CHECK(opened_on_all(kReplica) == ""); }

void a_large_recommended_granularity_is_not_paid_for() {
  driver().recommended_granularity = size_t{512} << 20;
  CHECK(opened_on_all(kReplica) == "");
  driver().recommended_granularity = size_t{4} << 20;
  CHECK(opened_on_all(size_t{8} << 20) == "");
  driver() = {};
}

void what_cannot_work_is_refused_on_all_ranks() {
  driver().device_without_multicast = 2;
  CHECK_CONTAINS(opened_on_all(0), "device 2 has no multicast memory; expected Hopper or newer with NVSwitch");
  driver() = {};
  driver().one_gpu = true;
  CHECK_CONTAINS(opened_on_all(0), "ranks 0 and 1 share GPU 0000:00:00.0; expected a GPU for each rank");
  driver() = {};
}

void one_ranks_failure_ends_the_opening_of_all() {
  const std::pair<const char*, int> failures[] = {{"cuMulticastCreate", 0},
                                                  {"cuMulticastAddDevice", 1},
                                                  {"cuMemCreate", 2},
                                                  {"cuMulticastBindMem", 3},
                                                  {"cuMemSetAccess", 1}};
  for (const auto& [call, device] : failures) {
    driver().failing_call = call;
    driver().failing_device = device;
    const std::string text = opened_on_all(0);
    CHECK_CONTAINS(text, call);
    CHECK_CONTAINS(text, format_text("(rank %d)", device).c_str());
    driver() = {};
  }
}

}  // namespace

int main() {
  all_ranks_get_a_replica_and_leave_nothing_behind();
  a_large_recommended_granularity_is_not_paid_for();
  what_cannot_work_is_refused_on_all_ranks();
  one_ranks_failure_ends_the_opening_of_all();
}
