// SPDX-License-Identifier: Apache-2.0
// Errors with the library's name in front; the status numbers are those of pt_status.
#pragma once

#include "common/error.h"
#include "pt/linear.h"

// User input: the message carries the values and what was expected.
#define PT_LINEAR_REQUIRE(condition, ...)                                                                  \
  do {                                                                                                     \
    if (!(condition)) throw ::pt::Error(PT_INVALID_ARGUMENT, "linear: " + ::pt::format_text(__VA_ARGS__)); \
  } while (false)
