// SPDX-License-Identifier: Apache-2.0
#include "linear/error.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace pt::linear {
namespace {

thread_local char last_error_text[1024] = "";

}  // namespace

void fail(pt_linear_status status, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  throw Error(status, std::string("linear: ") + text);
}

const char* last_error() noexcept { return last_error_text; }

void set_last_error(const char* text) noexcept {
  std::strncpy(last_error_text, text, sizeof(last_error_text) - 1);
  last_error_text[sizeof(last_error_text) - 1] = '\0';
}

}  // namespace pt::linear
