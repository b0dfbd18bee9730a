// SPDX-License-Identifier: Apache-2.0
// One exception type inside the library, one status code per thread outside of it.
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "pt/track_fusion.h"

namespace pt {

class Error : public std::runtime_error {
 public:
  Error(pt_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  pt_status status() const noexcept { return status_; }

 private:
  pt_status status_;
};

[[noreturn]] void fail(pt_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// `what` failed with the current errno.
[[noreturn]] void fail_errno(const std::string& what);

std::string format_text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Text of the calling thread's last failure. Fixed storage, so that recording an error cannot fail itself.
const char* last_error() noexcept;
void set_last_error(const char* text) noexcept;

// Runs `body` at the ABI border: whatever it throws becomes a status and the thread's error text.
template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return PT_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return PT_SYSTEM_ERROR;
  } catch (const std::system_error& error) {  // no thread to be had, for one
    set_last_error(error.what());
    return PT_SYSTEM_ERROR;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return PT_INTERNAL;
  } catch (...) {
    set_last_error("unknown exception");
    return PT_INTERNAL;
  }
}

}  // namespace pt

// User input: the message carries the values and what was expected.
#define PT_REQUIRE(condition, ...)                                  \
  do {                                                              \
    if (!(condition)) ::pt::fail(PT_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (false)
