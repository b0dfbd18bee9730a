// SPDX-License-Identifier: Apache-2.0
// Where the bytes of an encoded [rows, hidden] lie: codes of all groups, then scales of all groups.
#pragma once

#include "codecs/codec.h"

namespace pt::codecs {
namespace {

// No 32-bit word of a message equals this, whatever was encoded: kernels may use it for "not yet arrived".
constexpr uint32_t kSentinel = 0x80000000u;
constexpr size_t kMessageAlign = 16;

template <typename Codec>
struct Layout {
  static constexpr size_t kCodeBytes = Codec::kGroup * Codec::kCodeBits / 8;  // of one group; a multiple of 16
  static constexpr size_t kScaleBytes = sizeof(typename Codec::Scale);

  static constexpr PT_HOST_DEVICE size_t groups_per_row(size_t hidden) {
    return (hidden + Codec::kGroup - 1) / Codec::kGroup;
  }
  static constexpr PT_HOST_DEVICE size_t scales_offset(size_t groups) { return groups * kCodeBytes; }
  static constexpr PT_HOST_DEVICE size_t encoded_bytes(size_t groups) {
    return (groups * (kCodeBytes + kScaleBytes) + kMessageAlign - 1) / kMessageAlign * kMessageAlign;
  }
};

// Calls visit(Codec{}) for a pt_codec other than PT_CODEC_NONE; false when there is no such codec.
template <typename Visit>
inline bool with_codec(int codec, Visit&& visit) {
  switch (codec) {
    case PT_CODEC_INT8:
      visit(Int8{});
      return true;
    case PT_CODEC_FP8:
      visit(Fp8{});
      return true;
    case PT_CODEC_INT4:
      visit(Int4{});
      return true;
    case PT_CODEC_MXFP4:
      visit(Mxfp4{});
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace pt::codecs
