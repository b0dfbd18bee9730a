// SPDX-License-Identifier: Apache-2.0
// A group spread over the lanes of a warp, 8 neighbouring values each (16 bytes of a 16-bit type): what fusion kernels
// put between their loads and their stores. Same bytes as codecs/group.h.
#pragma once

#include "codecs/layout.h"

namespace pt::codecs {
namespace {

constexpr int kLaneValues = 8;

template <size_t code_bits>
struct LaneCodes;

template <>
struct LaneCodes<8> {
  using Word = uint2;
  static __device__ __forceinline__ uint32_t get(const Word& word, int i) {
    return (i < 4 ? word.x >> (8 * i) : word.y >> (8 * (i - 4))) & 0xFFu;
  }
  static __device__ __forceinline__ void put(Word& word, int i, uint32_t code) {
    if (i < 4) {
      word.x |= code << (8 * i);
    } else {
      word.y |= code << (8 * (i - 4));
    }
  }
  static __device__ __forceinline__ Word none() { return make_uint2(0, 0); }
};

template <>
struct LaneCodes<4> {
  using Word = uint32_t;
  static __device__ __forceinline__ uint32_t get(Word word, int i) { return (word >> (4 * i)) & 0xFu; }
  static __device__ __forceinline__ void put(Word& word, int i, uint32_t code) { word |= code << (4 * i); }
  static __device__ __forceinline__ Word none() { return 0; }
};

template <typename Codec>
struct Lane {
  using Codes = LaneCodes<Codec::kCodeBits>;
  using Word = typename Codes::Word;
  using Scale = typename Codec::Scale;
  static constexpr int kLanes = static_cast<int>(Codec::kGroup) / kLaneValues;  // of one group: neighbours in a warp

  // All 32 lanes of the warp take part. Values past the end of a row are zeros. Every lane gets the group's scale.
  static __device__ __forceinline__ Scale encode(const float (&values)[kLaneValues], Word& word) {
    uint32_t largest = 0;
    PT_UNROLL
    for (int i = 0; i < kLaneValues; ++i) largest = max(largest, magnitude_bits(values[i]));
    PT_UNROLL
    for (int other = kLanes / 2; other > 0; other /= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, other));
    }
    const Scale scale = Codec::scale_for(largest);
    const Scaling scaling = scaling_of<Codec>(scale);
    word = Codes::none();
    PT_UNROLL
    for (int i = 0; i < kLaneValues; ++i) Codes::put(word, i, Codec::encode(values[i], scaling));
    return scale;
  }

  static __device__ __forceinline__ void decode(const Word& word, Scale scale, float (&values)[kLaneValues]) {
    const float factor = Codec::scale_value(scale);
    PT_UNROLL
    for (int i = 0; i < kLaneValues; ++i) values[i] = multiply(Codec::decode(Codes::get(word, i)), factor);
  }
};

}  // namespace
}  // namespace pt::codecs
