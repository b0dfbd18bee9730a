// SPDX-License-Identifier: Apache-2.0
// What a test tells the stand-in of the NVIDIA driver, and asks it.
#pragma once

#include <string>

struct FakeDriver {
  // Told.
  int device_without_multicast = -1;
  bool one_gpu = false;  // whatever the ordinal
  size_t recommended_granularity = size_t{2} << 20;
  std::string failing_call;
  int failing_device = -1;
  // Asked.
  std::string violation;  // the first rule of the driver's documentation that was broken
  size_t held = 0;        // handles, reservations, mappings and bindings
  size_t bound_bytes = 0;
};

// In libcuda.so.1, as everything of it.
extern "C" FakeDriver* fake_driver();
