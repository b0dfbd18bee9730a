// SPDX-License-Identifier: Apache-2.0
#include "common/shared_segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "common/error.h"
#include "common/unique_fd.h"

namespace pt {
namespace {

constexpr char kNamePrefix[] = "/pt-track-fusion-";

std::string random_name() {
  uint64_t words[2];
  if (::getrandom(words, sizeof(words), 0) != static_cast<ssize_t>(sizeof(words))) fail_errno("getrandom");
  return format_text("%s%016llx%016llx", kNamePrefix, static_cast<unsigned long long>(words[0]),
                     static_cast<unsigned long long>(words[1]));
}

[[noreturn]] void fail_full(size_t bytes, unsigned long long free_bytes) {
  fail(PT_SYSTEM_ERROR,
       "shared memory is full: the group needs %zu bytes in /dev/shm, %llu are free. Use a smaller capacity_bytes or "
       "enlarge /dev/shm (containers: --shm-size)",
       bytes, free_bytes);
}

// ftruncate alone would succeed on a full /dev/shm, and the first store would raise SIGBUS.
void reserve(int fd, size_t bytes) {
  struct statvfs shm = {};
  const unsigned long long free_bytes =
      ::fstatvfs(fd, &shm) == 0 ? static_cast<unsigned long long>(shm.f_bavail) * shm.f_frsize : 0;
  // Asked first: posix_fallocate would take all that is left before it gives up. No block count: no limit is set.
  if (shm.f_blocks != 0 && free_bytes < bytes) fail_full(bytes, free_bytes);
  int code;
  do {
    code = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (code == EINTR);
  if (code == 0) return;
  if (code == ENOSPC || code == ENOMEM || code == EFBIG) fail_full(bytes, free_bytes);
  errno = code;
  fail_errno("posix_fallocate of shared memory");
}

}  // namespace

std::shared_ptr<SharedSegment> SharedSegment::create(size_t bytes) {
  const std::string name = random_name();
  UniqueFd fd(::shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  if (!fd.valid()) fail_errno("shm_open of a new segment");
  try {
    reserve(fd.get(), bytes);
    return std::shared_ptr<SharedSegment>(new SharedSegment(name, fd.get(), bytes, true));
  } catch (...) {
    ::shm_unlink(name.c_str());
    throw;
  }
}

std::shared_ptr<SharedSegment> SharedSegment::attach(const std::string& name, size_t min_bytes) {
  PT_REQUIRE(name.starts_with(kNamePrefix), "attach: '%s' is not a group name, expected '%s...'", name.c_str(),
             kNamePrefix);
  UniqueFd fd(::shm_open(name.c_str(), O_RDWR, 0));
  if (!fd.valid()) fail_errno("attach: shm_open of '" + name + "'");
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) fail_errno("attach: fstat of '" + name + "'");
  PT_REQUIRE(info.st_uid == ::geteuid(), "attach: '%s' belongs to user %u, expected %u", name.c_str(),
             static_cast<unsigned>(info.st_uid), static_cast<unsigned>(::geteuid()));
  PT_REQUIRE(static_cast<size_t>(info.st_size) >= min_bytes,
             "attach: '%s' has %lld bytes, expected at least %zu: not a track fusion segment", name.c_str(),
             static_cast<long long>(info.st_size), min_bytes);
  return std::shared_ptr<SharedSegment>(new SharedSegment(name, fd.get(), static_cast<size_t>(info.st_size), false));
}

SharedSegment::SharedSegment(std::string name, int fd, size_t bytes, bool owner)
    : name_(std::move(name)), bytes_(bytes), owner_(owner), data_(nullptr) {
  void* address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) fail_errno("mmap of shared memory");
  data_ = static_cast<std::byte*>(address);
}

SharedSegment::~SharedSegment() {
  if (owner_) unlink();
  ::munmap(data_, bytes_);
}

void SharedSegment::unlink() const noexcept { ::shm_unlink(name_.c_str()); }

}  // namespace pt
