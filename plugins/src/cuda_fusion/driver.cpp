// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/driver.h"

#include <dlfcn.h>

#include "cuda_fusion/error.h"

namespace pt::cuda_fusion {
namespace {

template <typename Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function == nullptr) {
    throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: the NVIDIA driver has no %s, it is too old", name));
  }
}

void* open_library() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded, as the runtime keeps it anyway
  if (library == nullptr) {
    throw Error(PT_UNSUPPORTED, format_text("cuda_fusion: no NVIDIA driver: %s", ::dlerror()));
  }
  return library;
}

Driver load() {
  void* library = open_library();
  Driver driver = {};
  look_up(library, "cuGetErrorString", driver.get_error_string);
  look_up(library, "cuMemGetAllocationGranularity", driver.get_granularity);
  look_up(library, "cuMemCreate", driver.create);
  look_up(library, "cuMemRelease", driver.release);
  look_up(library, "cuMemExportToShareableHandle", driver.export_handle);
  look_up(library, "cuMemImportFromShareableHandle", driver.import_handle);
  look_up(library, "cuMemAddressReserve", driver.reserve);
  look_up(library, "cuMemAddressFree", driver.address_free);
  look_up(library, "cuMemMap", driver.map);
  look_up(library, "cuMemUnmap", driver.unmap);
  look_up(library, "cuMemSetAccess", driver.set_access);
  return driver;
}

MulticastDriver load_multicast() {
  void* library = open_library();
  MulticastDriver driver = {};
  look_up(library, "cuDeviceGet", driver.device);
  look_up(library, "cuDeviceGetAttribute", driver.attribute);
  look_up(library, "cuDeviceGetPCIBusId", driver.bus_id);
  look_up(library, "cuMulticastGetGranularity", driver.get_granularity);
  look_up(library, "cuMulticastCreate", driver.create);
  look_up(library, "cuMulticastAddDevice", driver.add_device);
  look_up(library, "cuMulticastBindMem", driver.bind);
  look_up(library, "cuMulticastUnbind", driver.unbind);
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load();  // tried again by the next call when it throws
  return driver;
}

const MulticastDriver& MulticastDriver::get() {
  static const MulticastDriver driver = load_multicast();
  return driver;
}

void Driver::check(CUresult result, const char* what) const {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  get_error_string(result, &text);
  throw Error(PT_SYSTEM_ERROR,
              format_text("cuda_fusion: %s: %s (%d)", what, text == nullptr ? "unknown error" : text, result));
}

}  // namespace pt::cuda_fusion
