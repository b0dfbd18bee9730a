// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/virtual_memory.h"

#include <cstdint>

namespace pt::cuda_fusion {

void Mapping::map(CUmemGenericAllocationHandle handle, size_t bytes, size_t granularity, int device) {
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

void Mapping::unmap() noexcept {
  if (bytes_ == 0) return;
  const Driver& driver = Driver::get();
  driver.unmap(address_, bytes_);
  driver.address_free(address_, bytes_);
  bytes_ = 0;
}

size_t rounded_up(size_t bytes, size_t granularity) { return (bytes + granularity - 1) / granularity * granularity; }

CUmemAllocationProp shareable_memory(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
  return properties;
}

size_t recommended_granularity(const CUmemAllocationProp& properties) {
  const Driver& driver = Driver::get();
  size_t granularity = 0;
  driver.check(driver.get_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cuMemGetAllocationGranularity");
  return granularity;
}

Physical create_memory(size_t bytes, const CUmemAllocationProp& properties) {
  const Driver& driver = Driver::get();
  CUmemGenericAllocationHandle handle = 0;
  driver.check(driver.create(&handle, bytes, &properties, 0), "cuMemCreate");
  return Physical(handle);
}

UniqueFd export_handle(CUmemGenericAllocationHandle handle) {
  const Driver& driver = Driver::get();
  int fd = -1;
  driver.check(driver.export_handle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
               "cuMemExportToShareableHandle");
  return UniqueFd(fd);
}

Physical import_handle(const UniqueFd& fd) {
  const Driver& driver = Driver::get();
  CUmemGenericAllocationHandle handle = 0;
  driver.check(driver.import_handle(&handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd.get())),
                                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
               "cuMemImportFromShareableHandle");
  return Physical(handle);
}

}  // namespace pt::cuda_fusion
