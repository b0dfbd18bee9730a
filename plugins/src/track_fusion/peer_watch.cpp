// SPDX-License-Identifier: Apache-2.0
#include "track_fusion/peer_watch.h"

#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pt::track_fusion {
namespace {

struct ProcStat {
  char state = '?';
  uint64_t start_time = 0;
};

// State and start time from /proc/<pid>/stat; '?' when it cannot be read.
ProcStat read_proc_stat(pid_t pid) {
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", static_cast<int>(pid));
  ProcStat result;
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return result;
  char text[1024];
  const size_t length = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[length] = '\0';
  // The command name may hold spaces and parentheses: the fields start after the last ')'.
  const char* cursor = std::strrchr(text, ')');
  if (cursor == nullptr || cursor[1] != ' ') return result;
  cursor += 2;
  result.state = *cursor;
  for (int field = 3; field < 22 && cursor != nullptr; ++field) {
    cursor = std::strchr(cursor, ' ');
    if (cursor != nullptr) ++cursor;
  }
  if (cursor != nullptr) result.start_time = std::strtoull(cursor, nullptr, 10);
  return result;
}

int open_pidfd(pid_t pid) {
#ifdef SYS_pidfd_open
  return static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
#else
  static_cast<void>(pid);
  errno = ENOSYS;
  return -1;
#endif
}

}  // namespace

ProcessIdentity ProcessIdentity::self() { return {::getpid(), read_proc_stat(::getpid()).start_time}; }

uint64_t pid_namespace() {
  struct stat info = {};
  return ::stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

PeerWatch::PeerWatch(ProcessIdentity peer, bool use_pidfd) : peer_(peer) {
  if (use_pidfd) pidfd_ = UniqueFd(open_pidfd(peer.pid));
  // Asked after opening: from here on the descriptor cannot change its process.
  gone_at_start_ = pidfd_.valid() ? is_another_process(read_proc_stat(peer.pid).start_time) : is_gone_in_proc();
}

bool PeerWatch::is_gone() const {
  if (gone_at_start_) return true;
  if (!pidfd_.valid()) return is_gone_in_proc();
  pollfd entry = {pidfd_.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

bool PeerWatch::is_gone_in_proc() const {
  if (::kill(peer_.pid, 0) != 0 && errno == ESRCH) return true;
  const ProcStat now = read_proc_stat(peer_.pid);
  if (now.state == 'Z' || now.state == 'X') return true;
  return is_another_process(now.start_time);
}

bool PeerWatch::is_another_process(uint64_t start_time) const {
  return peer_.start_time != 0 && start_time != 0 && start_time != peer_.start_time;
}

}  // namespace pt::track_fusion
