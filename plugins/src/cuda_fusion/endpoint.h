// SPDX-License-Identifier: Apache-2.0
// One rank's end of a channel: opened and closed together with the others, used alone.
#pragma once

#include <memory>

#include "cuda_fusion/backend.h"

namespace pt::cuda_fusion {

// Checks a configuration and fills in its defaults.
Settings resolve(const pt_cuda_fusion_config& config);

class Endpoint {
 public:
  // Collective.
  Endpoint(const pt_cuda_fusion_config& config, pt_cuda_fusion_all_gather all_gather, void* context);

  int size() const { return settings_.common.size; }
  void fuse(const pt_cuda_fusion_arguments& arguments, void* stream);
  Algorithm algorithm_for(const pt_cuda_fusion_arguments& arguments) const;
  // Throws what ended the channel.
  void check_status() const;
  void abort();
  // Collective.
  void close();

 private:
  Plan plan(const pt_cuda_fusion_arguments& arguments) const;

  Settings settings_;
  Exchange exchange_;
  std::unique_ptr<Backend> backend_;
};

}  // namespace pt::cuda_fusion
