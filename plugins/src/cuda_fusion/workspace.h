// SPDX-License-Identifier: Apache-2.0
// What a workspace and its control block hold before the first call.
#pragma once

#include <cstddef>

#include "cuda_fusion/layout.h"

namespace pt::cuda_fusion {

// The part of a workspace before its inboxes: header and flags.
inline void fill_head(std::byte* head, const Layout& layout, uint32_t rank) {
  auto* words = reinterpret_cast<uint32_t*>(head);
  for (size_t i = 0; i < Layout::inboxes() / sizeof(uint32_t); ++i) words[i] = kFirstEpoch;
  *reinterpret_cast<Header*>(head) = {
      .magic = kMagic, .layout_version = kLayoutVersion, .size = layout.size, .rank = rank, .abort = 0, .probe = {}};
}

inline Control first_control() {
  Control control = {};
  control.one_shot_epoch = kFirstEpoch;
  control.staged_epoch = kFirstEpoch;
  return control;
}

}  // namespace pt::cuda_fusion
