// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/multicast.h"

#include <algorithm>

#include "cuda_fusion/error.h"
#include "cuda_fusion/fd_exchange.h"

namespace pt::cuda_fusion {
namespace {

CUdevice driver_device(int ordinal) {
  CUdevice device = 0;
  Driver::get().check(MulticastDriver::get().device(&device, ordinal), "cuDeviceGet");
  return device;
}

void check_support(int device) {
  int supported = 0;
  Driver::get().check(
      MulticastDriver::get().attribute(&supported, CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, driver_device(device)),
      "cuDeviceGetAttribute");
  if (supported == 0) {
    throw Error(PT_UNSUPPORTED,
                format_text("cuda_fusion: open: use_nvls is set, and device %d has no multicast memory; "
                            "expected Hopper or newer with NVSwitch, or a channel without use_nvls",
                            device));
  }
}

CUmulticastObjectProp team_of(int size, size_t bytes) {
  CUmulticastObjectProp team = {};
  team.numDevices = static_cast<unsigned>(size);
  team.size = bytes;
  team.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return team;
}

// The recommended one is 2 MiB with some drivers and 512 MiB with others: taken where the memory is that large anyway.
size_t multicast_granularity(const CUmulticastObjectProp& team) {
  const auto get = MulticastDriver::get().get_granularity;
  size_t minimum = 0, recommended = 0;
  Driver::get().check(get(&minimum, &team, CU_MULTICAST_GRANULARITY_MINIMUM), "cuMulticastGetGranularity");
  Driver::get().check(get(&recommended, &team, CU_MULTICAST_GRANULARITY_RECOMMENDED), "cuMulticastGetGranularity");
  return recommended <= team.size ? recommended : minimum;
}

}  // namespace

Multicast::Binding::~Binding() {
  if (bytes_ != 0) MulticastDriver::get().unbind(object_, device_, 0, bytes_);
}

void Multicast::Binding::bind(const Physical& object, const Physical& memory, size_t bytes, CUdevice device) {
  Driver::get().check(MulticastDriver::get().bind(object.get(), 0, memory.get(), 0, bytes, 0),
                      "cuMulticastBindMem (does the fabric manager run?)");
  object_ = object.get();
  bytes_ = bytes;
  device_ = device;
}

// What a replica takes, the same on all ranks. Refuses what would fail or block later.
size_t Multicast::agree_on_bytes(const Settings& settings, int device, const Exchange& exchange) {
  struct Place {
    char bus_id[32];
    size_t granularity;
  } mine = {};
  const size_t bytes = settings.common.layout.staging_bytes;
  exchange.together([&] {
    check_support(device);
    const CUdevice named = driver_device(device);
    Driver::get().check(MulticastDriver::get().bus_id(mine.bus_id, sizeof(mine.bus_id), named), "cuDeviceGetPCIBusId");
    mine.granularity = std::max(multicast_granularity(team_of(settings.common.size, bytes)),
                                recommended_granularity(shareable_memory(device)));
  });
  const std::vector<Place> places = exchange.all_gather(mine);
  exchange.together([&] {
    for (size_t rank = 0; rank < places.size(); ++rank) {
      granularity_ = std::max(granularity_, places[rank].granularity);
      if (static_cast<int>(rank) == settings.rank || std::strcmp(places[rank].bus_id, mine.bus_id) != 0) continue;
      throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: open: use_nvls is set, and ranks %d and %zu share GPU %s; "
                                              "expected a GPU for each rank",
                                              settings.rank, rank, mine.bus_id));
    }
  });
  return rounded_up(bytes, granularity_);
}

Multicast::Multicast(const Settings& settings, int device, const Exchange& exchange) {
  const size_t bytes = agree_on_bytes(settings, device, exchange);
  UniqueFd own_fd;
  exchange.together([&] {
    if (settings.rank != 0) return;
    const CUmulticastObjectProp team = team_of(settings.common.size, bytes);
    CUmemGenericAllocationHandle object = 0;
    Driver::get().check(MulticastDriver::get().create(&object, &team), "cuMulticastCreate");
    object_ = Physical(object);
    own_fd = export_handle(object);
  });
  const std::vector<UniqueFd> fds =
      exchange_fds(settings.rank, settings.common.size, own_fd.get(), exchange, settings.common.timeout_s);
  exchange.together([&] {
    if (settings.rank != 0) object_ = import_handle(fds[0]);
    Driver::get().check(MulticastDriver::get().add_device(object_.get(), driver_device(device)),
                        "cuMulticastAddDevice");
  });
  // Binding and mapping block until all devices have been added: `together` has seen to it that they have.
  exchange.together([&] {
    memory_ = create_memory(bytes, shareable_memory(device));
    binding_.bind(object_, memory_, bytes, driver_device(device));
    replica_.map(memory_.get(), bytes, granularity_, device);
    all_.map(object_.get(), bytes, granularity_, device);
  });
}

}  // namespace pt::cuda_fusion
