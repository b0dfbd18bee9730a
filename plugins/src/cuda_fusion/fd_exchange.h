// SPDX-License-Identifier: Apache-2.0
// File descriptors between processes of one host, over Unix sockets. Knows nothing of CUDA.
#pragma once

#include <vector>

#include "common/unique_fd.h"
#include "cuda_fusion/exchange.h"

namespace pt::cuda_fusion {

// The descriptors of all ranks that have one to give (`fd` is not -1), in rank order, valid in this process; the other
// places and the own one are empty. Collective: throws on all ranks or on none. Only processes of the same user are
// talked to.
std::vector<UniqueFd> exchange_fds(int rank, int size, int fd, const Exchange& exchange, double timeout_s);

}  // namespace pt::cuda_fusion
