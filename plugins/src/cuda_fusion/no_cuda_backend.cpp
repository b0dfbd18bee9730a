// SPDX-License-Identifier: Apache-2.0
// Built in place of the CUDA backend where there is no CUDA.
#include "cuda_fusion/backend.h"

namespace pt::cuda_fusion {

std::unique_ptr<Backend> make_cuda_backend(const Settings& settings, const Exchange& exchange) {
  exchange.together([&] {
    throw Error(PT_UNSUPPORTED,
                format_text("cuda_fusion: open: provider %d needs CUDA, and this library was built without; configure "
                            "it with -DPT_ENABLE_CUDA=ON",
                            settings.common.provider));
  });
  return nullptr;
}

}  // namespace pt::cuda_fusion
