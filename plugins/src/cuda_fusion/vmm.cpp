// SPDX-License-Identifier: Apache-2.0
// Ranks as processes of one host: physical memory as a file descriptor that peers map for themselves.
#include "cuda_fusion/cuda_check.h"
#include "cuda_fusion/driver.h"
#include "cuda_fusion/fd_exchange.h"
#include "cuda_fusion/providers.h"

namespace pt::cuda_fusion {
namespace {

// Physical memory, mapped at an address of this process for one device.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { unmap(); }

  void map(CUmemGenericAllocationHandle handle, size_t bytes, size_t granularity, int device) {
    const Driver& driver = Driver::get();
    driver.check(driver.reserve(&address_, bytes, granularity, 0, 0), "cuMemAddressReserve");
    bytes_ = bytes;
    const CUresult mapped = driver.map(address_, bytes, 0, handle, 0);
    if (mapped != CUDA_SUCCESS) {
      driver.address_free(address_, bytes_);
      bytes_ = 0;
      driver.check(mapped, "cuMemMap");
    }
    CUmemAccessDesc access = {};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    driver.check(driver.set_access(address_, bytes, &access, 1), "cuMemSetAccess");
  }

  void unmap() noexcept {
    if (bytes_ == 0) return;
    const Driver& driver = Driver::get();
    driver.unmap(address_, bytes_);
    driver.address_free(address_, bytes_);
    bytes_ = 0;
  }

  unsigned char* address() const { return reinterpret_cast<unsigned char*>(address_); }

 private:
  CUdeviceptr address_ = 0;
  size_t bytes_ = 0;
};

// A mapping holds the memory: the handle may go as soon as it is mapped.
class Physical {
 public:
  explicit Physical(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;
  ~Physical() { Driver::get().release(handle_); }
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_;
};

class Vmm : public PeerMemory {
 public:
  Vmm(const Settings& settings, const Exchange& exchange) : rank_(settings.rank), size_(settings.common.size) {
    size_t bytes = 0, granularity = 0;
    int device = 0;
    UniqueFd own_fd;
    exchange.together([&] {
      const Driver& driver = Driver::get();
      PT_CUDA(cudaGetDevice(&device));
      CUmemAllocationProp properties = {};
      properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
      properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
      properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
      driver.check(driver.get_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                   "cuMemGetAllocationGranularity");
      bytes = (settings.common.layout.total() + granularity - 1) / granularity * granularity;
      CUmemGenericAllocationHandle handle = 0;
      driver.check(driver.create(&handle, bytes, &properties, 0), "cuMemCreate");
      const Physical physical(handle);
      mappings_[rank_].map(handle, bytes, granularity, device);
      int fd = -1;
      driver.check(driver.export_handle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                   "cuMemExportToShareableHandle");
      own_fd = UniqueFd(fd);
    });
    const std::vector<UniqueFd> fds = exchange_fds(rank_, size_, own_fd.get(), exchange, settings.common.timeout_s);
    exchange.together([&] {
      const Driver& driver = Driver::get();
      for (int rank = 0; rank < size_; ++rank) {
        if (rank == rank_) continue;
        CUmemGenericAllocationHandle handle = 0;
        void* const fd = reinterpret_cast<void*>(static_cast<intptr_t>(fds[static_cast<size_t>(rank)].get()));
        driver.check(driver.import_handle(&handle, fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                     "cuMemImportFromShareableHandle");
        const Physical physical(handle);
        mappings_[rank].map(handle, bytes, granularity, device);
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
