// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of one process: addresses as they are, and peer access between their devices.
#include <unistd.h>

#include "cuda_fusion/cuda_check.h"
#include "cuda_fusion/providers.h"

namespace pt::cuda_fusion {
namespace {

struct Place {
  unsigned char* address;
  int device;
  pid_t pid;
};

void enable_peer_access(int device, int peer) {
  int possible = 0;
  PT_CUDA(cudaDeviceCanAccessPeer(&possible, device, peer));
  if (possible == 0) {
    throw Error(PT_UNSUPPORTED,
                format_text("cuda_fusion: open: device %d cannot address the memory of device %d", device, peer));
  }
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // or the next check would find it
    return;
  }
  check_cuda(error, "cudaDeviceEnablePeerAccess");
}

class SameProcess : public PeerMemory {
 public:
  SameProcess(const Settings& settings, const Exchange& exchange) {
    Place mine = {nullptr, 0, ::getpid()};
    exchange.together([&] {
      own_ = device_allocate<unsigned char>(settings.common.layout.total(), "the workspace");
      PT_CUDA(cudaGetDevice(&mine.device));
      mine.address = own_.get();
    });
    const std::vector<Place> places = exchange.all_gather(mine);
    exchange.together([&] {
      for (size_t rank = 0; rank < places.size(); ++rank) {
        const Place& place = places[rank];
        PT_FUSION_REQUIRE(place.pid == mine.pid, "open: rank %zu is in process %d, this one in %d; use CUDA IPC or VMM",
                          rank, place.pid, mine.pid);
        if (place.device != mine.device) enable_peer_access(mine.device, place.device);
        table_[rank] = place.address;
      }
    });
  }
  // Peer access stays: other users of the process may count on it.
  void unmap_peers() noexcept override {}

 private:
  DevicePointer<unsigned char> own_;
};

}  // namespace

std::unique_ptr<PeerMemory> open_same_process(const Settings& settings, const Exchange& exchange) {
  return std::make_unique<SameProcess>(settings, exchange);
}

}  // namespace pt::cuda_fusion
