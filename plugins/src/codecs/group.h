// SPDX-License-Identifier: Apache-2.0
// Whole groups on the host, in loops without branches so that they vectorise. Included by the
// kernels, and by those who play a device on the host.
#pragma once

#include "codecs/layout.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "messages are little-endian");

namespace pt::codecs {
namespace {

// values [kGroup] to kCodeBytes of codes and a scale.
template <typename Codec>
inline void encode_group(const float* __restrict values, uint8_t* __restrict codes, uint8_t* __restrict scale_bytes) {
  uint32_t largest = 0;
  for (size_t i = 0; i < Codec::kGroup; ++i) {
    const uint32_t magnitude = magnitude_bits(values[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  const typename Codec::Scale scale = Codec::scale_for(largest);
  __builtin_memcpy(scale_bytes, &scale, sizeof(scale));
  const Scaling scaling = scaling_of<Codec>(scale);
  if constexpr (Codec::kCodeBits == 8) {
    for (size_t i = 0; i < Codec::kGroup; ++i) codes[i] = static_cast<uint8_t>(Codec::encode(values[i], scaling));
  } else {
    alignas(64) uint8_t wide[Codec::kGroup];
    alignas(64) uint16_t pairs[Codec::kGroup / 2];  // two neighbours in a word, the first in its low byte
    for (size_t i = 0; i < Codec::kGroup; ++i) wide[i] = static_cast<uint8_t>(Codec::encode(values[i], scaling));
    __builtin_memcpy(pairs, wide, sizeof(pairs));
    for (size_t i = 0; i < Codec::kGroup / 2; ++i) codes[i] = static_cast<uint8_t>(pairs[i] | (pairs[i] >> 4));
  }
}

// A group's codes and scale to values [kGroup].
template <typename Codec>
inline void decode_group(const uint8_t* __restrict codes, const uint8_t* __restrict scale_bytes,
                         float* __restrict values) {
  typename Codec::Scale stored;
  __builtin_memcpy(&stored, scale_bytes, sizeof(stored));
  const float scale = Codec::scale_value(stored);
  if constexpr (Codec::kCodeBits == 8) {
    for (size_t i = 0; i < Codec::kGroup; ++i) values[i] = multiply(Codec::decode(codes[i]), scale);
  } else {
    alignas(64) uint8_t wide[Codec::kGroup];
    alignas(64) uint16_t pairs[Codec::kGroup / 2];
    for (size_t i = 0; i < Codec::kGroup / 2; ++i) {
      pairs[i] = static_cast<uint16_t>((codes[i] & 0x0Fu) | ((codes[i] & 0xF0u) << 4));
    }
    __builtin_memcpy(wide, pairs, sizeof(wide));
    for (size_t i = 0; i < Codec::kGroup; ++i) values[i] = multiply(Codec::decode(wide[i]), scale);
  }
}

}  // namespace
}  // namespace pt::codecs
