// SPDX-License-Identifier: Apache-2.0
// Three ways to a table of everybody's memory. Collective; the caller has made its device current.
#pragma once

#include "cuda_fusion/backend.h"

namespace pt::cuda_fusion {

std::unique_ptr<PeerMemory> open_same_process(const Settings& settings, const Exchange& exchange);
std::unique_ptr<PeerMemory> open_ipc(const Settings& settings, const Exchange& exchange);
std::unique_ptr<PeerMemory> open_vmm(const Settings& settings, const Exchange& exchange);

}  // namespace pt::cuda_fusion
