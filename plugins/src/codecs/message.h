// SPDX-License-Identifier: Apache-2.0
// A codec chosen at run time, with the sizes of its messages. For code that is compiled once.
#pragma once

#include <cstring>

#include "codecs/kernels.h"
#include "codecs/layout.h"

namespace pt::codecs {

const char* codec_name(int codec);

// `groups` groups at an address: codes, then scales, then zero bytes.
class Format {
 public:
  explicit Format(const CodecKernels& kernels) : kernels_(&kernels) {}

  size_t groups_per_row(size_t hidden) const { return (hidden + kernels_->group - 1) / kernels_->group; }
  size_t group_bytes() const { return kernels_->code_bytes + kernels_->scale_bytes; }
  size_t encoded_bytes(size_t groups) const {
    return (groups * group_bytes() + kMessageAlign - 1) / kMessageAlign * kMessageAlign;
  }
  // Groups whose message fits into `bytes`.
  size_t groups_in(size_t bytes) const { return bytes / kMessageAlign * kMessageAlign / group_bytes(); }
  // Groups from `first` on, of a message with `groups` groups.
  Encoded part(void* message, size_t groups, size_t first) const {
    auto* bytes = static_cast<uint8_t*>(message);
    return {bytes + first * kernels_->code_bytes,
            bytes + groups * kernels_->code_bytes + first * kernels_->scale_bytes};
  }
  ConstEncoded sent_part(const void* message, size_t groups, size_t first) const {
    const auto* bytes = static_cast<const uint8_t*>(message);
    return {bytes + first * kernels_->code_bytes,
            bytes + groups * kernels_->code_bytes + first * kernels_->scale_bytes};
  }
  void clear_padding(void* message, size_t groups) const {
    const size_t used = groups * group_bytes();
    std::memset(static_cast<uint8_t*>(message) + used, 0, encoded_bytes(groups) - used);
  }
  const CodecKernels& kernels() const { return *kernels_; }

 private:
  const CodecKernels* kernels_;
};

}  // namespace pt::codecs
