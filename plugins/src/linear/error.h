// SPDX-License-Identifier: Apache-2.0
// Exceptions inside the library, status and text per thread outside of it.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "pt/linear.h"

namespace pt::linear {

class Error : public std::runtime_error {
 public:
  Error(pt_linear_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  pt_linear_status status() const noexcept { return status_; }

 private:
  pt_linear_status status_;
};

[[noreturn]] void fail(pt_linear_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

const char* last_error() noexcept;
// Fixed storage, so that recording an error cannot fail itself.
void set_last_error(const char* text) noexcept;

template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return PT_LINEAR_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::exception& error) {  // bad_alloc, or no thread to be had
    set_last_error(error.what());
    return PT_LINEAR_SYSTEM_ERROR;
  }
}

}  // namespace pt::linear

// User input: the message carries the values and what was expected.
#define PT_LINEAR_REQUIRE(condition, ...)                                          \
  do {                                                                             \
    if (!(condition)) ::pt::linear::fail(PT_LINEAR_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (false)
