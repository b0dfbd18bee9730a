// SPDX-License-Identifier: Apache-2.0
// The driver's virtual memory: physical memory, its mappings and its descriptors, which all let go of themselves.
#pragma once

#include <utility>

#include "common/unique_fd.h"
#include "cuda_fusion/driver.h"

namespace pt::cuda_fusion {

// Memory, or a multicast object. A mapping holds what it shows: the handle may go as soon as it is mapped.
class Physical {
 public:
  Physical() = default;
  explicit Physical(CUmemGenericAllocationHandle handle) : handle_(handle), valid_(true) {}
  Physical(Physical&& other) noexcept : handle_(other.handle_), valid_(std::exchange(other.valid_, false)) {}
  Physical& operator=(Physical&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(valid_, other.valid_);
    return *this;
  }
  ~Physical() {
    if (valid_) Driver::get().release(handle_);
  }
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_ = 0;
  bool valid_ = false;
};

// Physical memory, mapped at an address of this process for one device.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { unmap(); }

  void map(CUmemGenericAllocationHandle handle, size_t bytes, size_t granularity, int device);
  void unmap() noexcept;

  unsigned char* address() const { return reinterpret_cast<unsigned char*>(address_); }

 private:
  CUdeviceptr address_ = 0;
  size_t bytes_ = 0;
};

size_t rounded_up(size_t bytes, size_t granularity);

// Memory of a device that other processes can be given.
CUmemAllocationProp shareable_memory(int device);
size_t recommended_granularity(const CUmemAllocationProp& properties);
Physical create_memory(size_t bytes, const CUmemAllocationProp& properties);

UniqueFd export_handle(CUmemGenericAllocationHandle handle);
Physical import_handle(const UniqueFd& fd);

}  // namespace pt::cuda_fusion
