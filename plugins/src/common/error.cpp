// SPDX-License-Identifier: Apache-2.0
#include "common/error.h"

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace pt {
namespace {

thread_local char last_error_text[4096] = "";

std::string format_list(const char* format, va_list arguments) {
  char text[4096];
  std::vsnprintf(text, sizeof(text), format, arguments);
  return text;
}

}  // namespace

void fail(pt_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_list(format, arguments);
  va_end(arguments);
  throw Error(status, "track_fusion: " + text);
}

void fail_errno(const std::string& what) {
  const int code = errno;
  fail(PT_SYSTEM_ERROR, "%s failed: %s (errno %d)", what.c_str(), std::generic_category().message(code).c_str(), code);
}

std::string format_text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_list(format, arguments);
  va_end(arguments);
  return text;
}

const char* last_error() noexcept { return last_error_text; }

void set_last_error(const char* text) noexcept {
  std::strncpy(last_error_text, text, sizeof(last_error_text) - 1);
  last_error_text[sizeof(last_error_text) - 1] = '\0';
}

}  // namespace pt
