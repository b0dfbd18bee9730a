// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set of hot loops at run time. They are compiled once per set, as tables of functions.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

#include "common/error.h"

namespace pt {

// Whether this machine runs code for "baseline", "avx2" (x86-64-v3) or "avx512" (x86-64-v4).
bool isa_runs_here(const char* isa) noexcept;

// The variant of that name if it was built and runs here, else null.
template <typename Kernels>
const Kernels* isa_named(std::initializer_list<const Kernels*> variants, const char* name) {
  for (const Kernels* variant : variants) {
    if (std::strcmp(variant->name, name) == 0 && isa_runs_here(name)) return variant;
  }
  return nullptr;
}

// The fastest variant that runs here, or the one the environment names. `variants`: fastest first.
template <typename Kernels>
const Kernels& choose_isa(const char* library, const char* variable, std::initializer_list<const Kernels*> variants) {
  const char* wanted = std::getenv(variable);
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string built;
  for (const Kernels* variant : variants) {
    if (any ? isa_runs_here(variant->name) : std::strcmp(variant->name, wanted) == 0) {
      if (isa_runs_here(variant->name)) return *variant;
      throw Error(PT_UNSUPPORTED, format_text("%s: %s is '%s', which this processor cannot run; unset it to choose "
                                              "automatically",
                                              library, variable, wanted));
    }
    built = variant->name + (built.empty() ? "" : ", " + built);
  }
  throw Error(PT_UNSUPPORTED,
              format_text("%s: %s is '%s', this build has: %s", library, variable, wanted, built.c_str()));
}

}  // namespace pt
