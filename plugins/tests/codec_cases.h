// SPDX-License-Identifier: Apache-2.0
// Compares the codec kernels of two instruction sets bit by bit: every codec and type, cut rows, every special value.
#pragma once

#include "codecs/message.h"
#include "kernel_cases.h"

namespace pt::testing {

// Groups of widely different sizes, some with NaN, infinity, denormals, or zeros only.
inline std::vector<uint8_t> random_groups(std::mt19937& random, int dtype, size_t count) {
  std::vector<uint8_t> data = random_elements(random, dtype, count);
  const size_t bytes = track_fusion::dtype_bytes(dtype);
  for (size_t begin = 0; begin < count; begin += 32) {
    const size_t end = std::min(count, begin + 32);
    const auto kind = random() % 4;
    if (kind == 0) continue;  // as it came: special values in most groups
    const int exponent =
        static_cast<int>(random() % (dtype == PT_FLOAT16 ? 20 : 240)) - (dtype == PT_FLOAT16 ? 12 : 115);
    for (size_t i = begin; i < end; ++i) {
      const float unit = static_cast<float>(random()) / 4294967296.0f - 0.5f;
      const float value = kind == 1 ? 0.0f : std::ldexp(unit, exponent);
      uint32_t bits = __builtin_bit_cast(uint32_t, value);
      if (dtype == PT_BFLOAT16) bits >>= 16;
      if (dtype == PT_FLOAT16) bits = random() % 0x7000u + (random() % 2 ? 0x8000u : 0u);
      std::memcpy(data.data() + i * bytes, &bits, bytes);
    }
  }
  return data;
}

inline void check_same_codec_bits(const codecs::Kernels& a, const codecs::Kernels& b) {
  std::mt19937 random(19);
  for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
    const codecs::Format format(a.codecs[codec - 1]), other(b.codecs[codec - 1]);
    CHECK(format.group_bytes() == other.group_bytes());
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (const size_t hidden : {1u, 31u, 32u, 128u, 200u, 512u}) {
        const size_t rows = 5, count = rows * hidden, groups = rows * format.groups_per_row(hidden);
        const codecs::GroupRange whole = {hidden, 0, groups};
        const auto x = random_groups(random, dtype, count), base = random_groups(random, dtype, count);
        std::vector<uint8_t> messages[3];
        codecs::ConstEncoded sources[3];
        for (int rank = 0; rank < 3; ++rank) {
          const auto own = random_groups(random, dtype, count);
          for (const void* known : {static_cast<const void*>(base.data()), static_cast<const void*>(nullptr)}) {
            std::vector<uint8_t> mine(format.encoded_bytes(groups)), theirs(mine.size());
            format.kernels().encode[dtype](own.data(), known, whole, format.part(mine.data(), groups, 0));
            other.kernels().encode[dtype](own.data(), known, whole, other.part(theirs.data(), groups, 0));
            CHECK(mine == theirs);
            messages[rank] = mine;
          }
          sources[rank] = format.sent_part(messages[rank].data(), groups, 0);
        }
        for (const void* residual : {static_cast<const void*>(nullptr), static_cast<const void*>(base.data())}) {
          std::vector<uint8_t> h(count * track_fusion::dtype_bytes(dtype)), other_h(h.size());
          format.kernels().reduce[dtype](sources, 3, residual, 1.0f / 3.0f, h.data(), whole);
          other.kernels().reduce[dtype](sources, 3, residual, 1.0f / 3.0f, other_h.data(), whole);
          CHECK(h == other_h);
        }
        std::vector<uint8_t> again(format.encoded_bytes(groups)), other_again(again.size());
        format.kernels().reduce_encode(sources, 3, 1.0f / 3.0f, groups, format.part(again.data(), groups, 0));
        other.kernels().reduce_encode(sources, 3, 1.0f / 3.0f, groups, other.part(other_again.data(), groups, 0));
        CHECK(again == other_again);
      }
    }
  }
}

}  // namespace pt::testing
