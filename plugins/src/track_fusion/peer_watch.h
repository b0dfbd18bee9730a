// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstdint>

#include "common/unique_fd.h"

namespace pt::track_fusion {

// A process as seen by its peers: the pid alone can be reused, pid and start time cannot.
struct ProcessIdentity {
  pid_t pid = 0;
  uint64_t start_time = 0;  // 0: unknown (no /proc)

  static ProcessIdentity self();
};

// Inode of the PID namespace, 0 when unknown. Pids of different namespaces mean nothing to each other.
uint64_t pid_namespace();

// Tells whether one peer's process has ended. A zombie has.
class PeerWatch {
 public:
  // `use_pidfd` false forces the /proc fallback (kernels before 5.3, seccomp filters); the answer is the same.
  explicit PeerWatch(ProcessIdentity peer, bool use_pidfd = true);

  bool is_gone() const;

 private:
  bool is_gone_in_proc() const;
  bool is_another_process(uint64_t start_time) const;

  ProcessIdentity peer_;
  UniqueFd pidfd_;
  bool gone_at_start_ = false;
};

}  // namespace pt::track_fusion
