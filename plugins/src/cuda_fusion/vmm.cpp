// SPDX-License-Identifier: Apache-2.0
// Ranks as processes of one host: physical memory as a file descriptor that peers map for themselves.
#include "cuda_fusion/cuda_check.h"
#include "cuda_fusion/fd_exchange.h"
#include "cuda_fusion/providers.h"
#include "cuda_fusion/virtual_memory.h"

namespace pt::cuda_fusion {
namespace {

class Vmm : public PeerMemory {
 public:
  Vmm(const Settings& settings, const Exchange& exchange) : rank_(settings.rank), size_(settings.common.size) {
    size_t bytes = 0, granularity = 0;
    int device = 0;
    UniqueFd own_fd;
    exchange.together([&] {
      PT_CUDA(cudaGetDevice(&device));
      const CUmemAllocationProp properties = shareable_memory(device);
      granularity = recommended_granularity(properties);
      bytes = rounded_up(settings.common.layout.total(), granularity);
      const Physical physical = create_memory(bytes, properties);
      mappings_[rank_].map(physical.get(), bytes, granularity, device);
      own_fd = export_handle(physical.get());
    });
    const std::vector<UniqueFd> fds = exchange_fds(rank_, size_, own_fd.get(), exchange, settings.common.timeout_s);
    exchange.together([&] {
      for (int rank = 0; rank < size_; ++rank) {
        if (rank == rank_) continue;
        const Physical physical = import_handle(fds[static_cast<size_t>(rank)]);
        mappings_[rank].map(physical.get(), bytes, granularity, device);
      }
    });
    for (int rank = 0; rank < size_; ++rank) table_[rank] = mappings_[rank].address();
  }

  void unmap_peers() noexcept override {
    for (int rank = 0; rank < size_; ++rank) {
      if (rank != rank_) mappings_[rank].unmap();
    }
  }

 private:
  int rank_;
  int size_;
  Mapping mappings_[kMaxRanks];
};

}  // namespace

std::unique_ptr<PeerMemory> open_vmm(const Settings& settings, const Exchange& exchange) {
  return std::make_unique<Vmm>(settings, exchange);
}

}  // namespace pt::cuda_fusion
