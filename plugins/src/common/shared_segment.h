// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace pt {

// A mapped POSIX shared memory segment. The creator's destructor removes the name if nobody did before.
class SharedSegment {
 public:
  // New zero-filled segment under a random name, mode 0600, with its pages reserved.
  static std::shared_ptr<SharedSegment> create(size_t bytes);
  // Maps all of an existing segment; refuses names that are not ours, other users' segments and ones below `min_bytes`.
  static std::shared_ptr<SharedSegment> attach(const std::string& name, size_t min_bytes);

  SharedSegment(const SharedSegment&) = delete;
  SharedSegment& operator=(const SharedSegment&) = delete;
  ~SharedSegment();

  std::byte* data() const noexcept { return data_; }
  size_t bytes() const noexcept { return bytes_; }
  const std::string& name() const noexcept { return name_; }
  // Removes the name; the memory lives on while it is mapped. Without effect when the name is already gone.
  void unlink() const noexcept;

 private:
  SharedSegment(std::string name, int fd, size_t bytes, bool owner);

  std::string name_;
  size_t bytes_;
  bool owner_;
  std::byte* data_;
};

}  // namespace pt
