// SPDX-License-Identifier: Apache-2.0
// The caller's own way to talk to the other ranks, used while a channel is opened and closed.
#pragma once

#include <cstring>
#include <vector>

#include "cuda_fusion/error.h"
#include "pt/cuda_fusion.h"

namespace pt::cuda_fusion {

class Exchange {
 public:
  Exchange(pt_cuda_fusion_all_gather all_gather, void* context, int size)
      : all_gather_(all_gather), context_(context), size_(static_cast<size_t>(size)) {}

  // What every rank sent, in rank order.
  template <typename Plain>
  std::vector<Plain> all_gather(const Plain& mine) const {
    static_assert(std::is_trivially_copyable_v<Plain>);
    std::vector<Plain> all(size_);
    const int status = all_gather_(context_, &mine, all.data(), sizeof(Plain));
    if (status != 0) {
      throw Error(PT_SYSTEM_ERROR, format_text("cuda_fusion: the exchange between ranks failed with %d", status));
    }
    return all;
  }

  void barrier() const { all_gather('b'); }

  // Runs `step` here; throws on all ranks when it threw on any, with the text of the first of them. So no rank goes on
  // alone, to wait for one that gave up.
  template <typename Step>
  void together(Step&& step) const {
    struct Outcome {
      int status;
      char text[500];
    } mine = {};
    try {
      step();
    } catch (const Error& error) {
      mine.status = error.status();
      std::strncpy(mine.text, error.what(), sizeof(mine.text) - 1);
    } catch (const std::exception& error) {
      mine.status = PT_SYSTEM_ERROR;
      std::strncpy(mine.text, error.what(), sizeof(mine.text) - 1);
    }
    const std::vector<Outcome> all = all_gather(mine);
    for (size_t rank = 0; rank < all.size(); ++rank) {
      if (all[rank].status == PT_OK) continue;
      throw Error(static_cast<pt_status>(all[rank].status), format_text("%s (rank %zu)", all[rank].text, rank));
    }
  }

 private:
  pt_cuda_fusion_all_gather all_gather_;
  void* context_;
  size_t size_;
};

}  // namespace pt::cuda_fusion
