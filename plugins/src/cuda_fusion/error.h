// SPDX-License-Identifier: Apache-2.0
// Errors with the library's name in front.
#pragma once

#include "common/error.h"

// User input: the message carries the values and what was expected.
#define PT_FUSION_REQUIRE(condition, ...)                                                                       \
  do {                                                                                                          \
    if (!(condition)) throw ::pt::Error(PT_INVALID_ARGUMENT, "cuda_fusion: " + ::pt::format_text(__VA_ARGS__)); \
  } while (false)
