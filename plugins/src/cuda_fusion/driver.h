// SPDX-License-Identifier: Apache-2.0
// The driver's virtual memory and multicast calls, looked up at run time: the library loads on machines without a
// driver.
#pragma once

#include <cuda.h>

namespace pt::cuda_fusion {

struct Driver {
  decltype(&::cuGetErrorString) get_error_string;
  decltype(&::cuMemGetAllocationGranularity) get_granularity;
  decltype(&::cuMemCreate) create;
  decltype(&::cuMemRelease) release;
  decltype(&::cuMemExportToShareableHandle) export_handle;
  decltype(&::cuMemImportFromShareableHandle) import_handle;
  decltype(&::cuMemAddressReserve) reserve;
  decltype(&::cuMemAddressFree) address_free;
  decltype(&::cuMemMap) map;
  decltype(&::cuMemUnmap) unmap;
  decltype(&::cuMemSetAccess) set_access;

  // Throws when there is no driver, or one without these calls.
  static const Driver& get();
  void check(CUresult result, const char* what) const;
};

// Of drivers from CUDA 12.1 on.
struct MulticastDriver {
  decltype(&::cuDeviceGet) device;
  decltype(&::cuDeviceGetAttribute) attribute;
  decltype(&::cuDeviceGetPCIBusId) bus_id;
  decltype(&::cuMulticastGetGranularity) get_granularity;
  decltype(&::cuMulticastCreate) create;
  decltype(&::cuMulticastAddDevice) add_device;
  decltype(&::cuMulticastBindMem) bind;
  decltype(&::cuMulticastUnbind) unbind;

  // Throws as Driver::get does.
  static const MulticastDriver& get();
};

}  // namespace pt::cuda_fusion
