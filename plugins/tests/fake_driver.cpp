// SPDX-License-Identifier: Apache-2.0
// libcuda.so.1 for machines without a GPU: no memory, but the rules of its virtual memory and multicast calls. Calls
// that would wait for ever, or whose behaviour would be undefined, are violations.
#include "fake_driver.h"

#include <cuda.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr size_t kGranularity = size_t{2} << 20;

struct Object {
  bool is_multicast = false;
  int device = 0;  // of memory
  size_t bytes = 0;
  size_t num_devices = 0;
  std::set<int> devices;
  std::map<int, size_t> bound;
  int handles = 0;
  int mappings = 0;
};

struct Reservation {
  size_t bytes = 0;
  CUmemGenericAllocationHandle shows = 0;
};

std::mutex mutex;
FakeDriver told;
std::map<CUmemGenericAllocationHandle, Object> objects;
std::map<CUdeviceptr, Reservation> reservations;
CUmemGenericAllocationHandle next_handle = 1;
CUdeviceptr next_address = CUdeviceptr{1} << 40;

CUresult violation(const char* text) {
  if (told.violation.empty()) told.violation = text;
  return CUDA_ERROR_INVALID_VALUE;
}

bool fails(const char* call, int device) { return told.failing_call == call && told.failing_device == device; }

bool complete(const Object& object) { return object.devices.size() == object.num_devices; }

CUresult add_handle(CUmemGenericAllocationHandle* handle, const Object& object) {
  *handle = next_handle++;
  objects[*handle] = object;
  objects[*handle].handles = 1;
  ++told.held;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

FakeDriver* fake_driver() {
  const std::lock_guard lock(mutex);
  return &told;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "the stand-in was told to fail";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED && device != told.device_without_multicast;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetPCIBusId(char* id, int bytes, CUdevice device) {
  std::snprintf(id, static_cast<size_t>(bytes), "0000:%02x:00.0", told.one_gpu ? 0 : device);
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp*,
                                       CUmemAllocationGranularity_flags) {
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}

CUresult cuMulticastGetGranularity(size_t* granularity, const CUmulticastObjectProp*,
                                   CUmulticastGranularity_flags which) {
  *granularity = which == CU_MULTICAST_GRANULARITY_MINIMUM ? kGranularity : told.recommended_granularity;
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp* properties,
                     unsigned long long) {
  const std::lock_guard lock(mutex);
  if (bytes == 0 || bytes % kGranularity != 0) return violation("memory of an odd size");
  if (properties->requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return violation("memory that a shared multicast object cannot bind");
  }
  if (fails("cuMemCreate", properties->location.id)) return CUDA_ERROR_OUT_OF_MEMORY;
  Object memory;
  memory.device = properties->location.id;
  memory.bytes = bytes;
  return add_handle(handle, memory);
}

CUresult cuMulticastCreate(CUmemGenericAllocationHandle* handle, const CUmulticastObjectProp* team) {
  const std::lock_guard lock(mutex);
  if (team->numDevices < 2) return violation("a team of one device");
  if (team->size == 0 || team->size % kGranularity != 0) return violation("a multicast object of an odd size");
  if (fails("cuMulticastCreate", 0)) return CUDA_ERROR_NOT_SUPPORTED;
  Object object;
  object.is_multicast = true;
  object.bytes = team->size;
  object.num_devices = team->numDevices;
  return add_handle(handle, object);
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const std::lock_guard lock(mutex);
  Object& object = objects[handle];
  if (object.handles == 0) return violation("a handle released twice");
  --told.held;
  if (--object.handles == 0 && object.is_multicast && !object.bound.empty()) {
    return violation("a multicast object released with memory bound");
  }
  return CUDA_SUCCESS;
}

// A descriptor that holds the handle's number.
CUresult cuMemExportToShareableHandle(void* fd, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType,
                                      unsigned long long) {
  int ends[2];
  if (::pipe(ends) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
  for (int i = 0; i < 16; ++i) {  // one for each importer
    if (::write(ends[1], &handle, sizeof(handle)) != sizeof(handle)) return CUDA_ERROR_OPERATING_SYSTEM;
  }
  ::close(ends[1]);
  *static_cast<int*>(fd) = ends[0];
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* fd, CUmemAllocationHandleType) {
  const std::lock_guard lock(mutex);
  if (::read(static_cast<int>(reinterpret_cast<intptr_t>(fd)), handle, sizeof(*handle)) != sizeof(*handle)) {
    return CUDA_ERROR_INVALID_HANDLE;
  }
  ++objects[*handle].handles;
  ++told.held;
  return CUDA_SUCCESS;
}

CUresult cuMulticastAddDevice(CUmemGenericAllocationHandle handle, CUdevice device) {
  const std::lock_guard lock(mutex);
  if (fails("cuMulticastAddDevice", device)) return CUDA_ERROR_INVALID_DEVICE;
  if (!objects[handle].devices.insert(device).second) return violation("a device added twice");
  return CUDA_SUCCESS;
}

CUresult cuMulticastBindMem(CUmemGenericAllocationHandle handle, size_t at, CUmemGenericAllocationHandle memory,
                            size_t memory_at, size_t bytes, unsigned long long) {
  const std::lock_guard lock(mutex);
  Object& object = objects[handle];
  const int device = objects[memory].device;
  if (!complete(object)) return violation("a binding that would wait for devices to be added");
  if (at != 0 || memory_at != 0 || bytes != object.bytes || bytes != objects[memory].bytes) {
    return violation("a binding of a part");
  }
  if (object.devices.count(device) == 0) return violation("memory of a device outside the team");
  if (fails("cuMulticastBindMem", device)) return CUDA_ERROR_SYSTEM_NOT_READY;
  object.bound[device] = bytes;
  ++told.held;
  told.bound_bytes += bytes;
  return CUDA_SUCCESS;
}

CUresult cuMulticastUnbind(CUmemGenericAllocationHandle handle, CUdevice device, size_t at, size_t bytes) {
  const std::lock_guard lock(mutex);
  Object& object = objects[handle];
  if (object.handles == 0) return violation("an unbinding after the release");
  if (object.bound.count(device) == 0 || object.bound[device] != bytes || at != 0) {
    return violation("an unbinding of what is not bound");
  }
  object.bound.erase(device);
  --told.held;
  told.bound_bytes -= bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* address, size_t bytes, size_t alignment, CUdeviceptr, unsigned long long) {
  const std::lock_guard lock(mutex);
  *address = next_address = (next_address + alignment - 1) / alignment * alignment;
  next_address += bytes;
  reservations[*address].bytes = bytes;
  ++told.held;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto found = reservations.find(address);
  if (found == reservations.end() || found->second.bytes != bytes || found->second.shows != 0) {
    return violation("addresses freed that are mapped or not reserved");
  }
  reservations.erase(found);
  --told.held;
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t bytes, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  const std::lock_guard lock(mutex);
  Object& object = objects[handle];
  if (object.is_multicast && !complete(object)) return violation("a mapping that would wait for devices to be added");
  if (bytes != object.bytes || reservations[address].bytes != bytes) return violation("a mapping of another size");
  reservations[address].shows = handle;
  ++object.mappings;
  ++told.held;
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t) {
  const std::lock_guard lock(mutex);
  const CUmemGenericAllocationHandle handle = reservations[address].shows;
  if (handle == 0) return violation("an unmapping of what is not mapped");
  reservations[address].shows = 0;
  --objects[handle].mappings;
  --told.held;
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t, const CUmemAccessDesc* access, size_t) {
  const std::lock_guard lock(mutex);
  return reservations[address].shows != 0 && !fails("cuMemSetAccess", access->location.id) ? CUDA_SUCCESS
                                                                                           : CUDA_ERROR_INVALID_VALUE;
}

}  // extern "C"
