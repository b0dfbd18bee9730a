// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "codecs/kernels.h"

namespace pt::codecs {

const Kernels& kernels_named(const char* isa) {
#if defined(PT_HAVE_X86_KERNELS)
  if (std::strcmp(isa, avx512::kKernels.name) == 0) return avx512::kKernels;
  if (std::strcmp(isa, avx2::kKernels.name) == 0) return avx2::kKernels;
#endif
  static_cast<void>(isa);
  return baseline::kKernels;
}

}  // namespace pt::codecs
