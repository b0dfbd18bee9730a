// SPDX-License-Identifier: Apache-2.0
// Packets of codes as the lanes of a warp make them: eight values each (codecs/lane.cuh). 256 values of a row are a
// warp's turn; their scales fill whole words, which its first lanes send.
#pragma once

#include <type_traits>

#include "codecs/lane.cuh"
#include "cuda_fusion/vector.h"

namespace pt::cuda_fusion {
namespace {

template <typename Codec>
struct WarpCoder {
  using Lane = codecs::Lane<Codec>;
  using Scale = typename Codec::Scale;
  static constexpr uint32_t kLanes = 32;
  static constexpr uint32_t kGroup = Codec::kGroup;
  static constexpr int kValues = codecs::kLaneValues;
  static constexpr uint32_t kGroupLanes = Lane::kLanes;
  static constexpr uint32_t kTurnGroups = kLanes / kGroupLanes;
  static constexpr uint32_t kScaleBits = sizeof(Scale) * 8;
  static constexpr uint32_t kScalesPerWord = 32 / kScaleBits;
  static constexpr uint32_t kTurnScaleWords = kTurnGroups / kScalesPerWord;
  static constexpr uint32_t kGroupWords = codecs::Layout<Codec>::kCodeBytes / sizeof(uint32_t);
  static_assert(kTurnGroups % kScalesPerWord == 0, "two warps would write one word of scales");

  using Codes = std::conditional_t<Codec::kCodeBits == 8, Pair, uint32_t>;
  struct Packet {
    Codes codes;
    uint32_t scales;  // made: what this lane sends, if it sends scales; loaded: with the scale of its own group
  };

  static __device__ __forceinline__ uint32_t packets(uint32_t groups) { return groups * kGroupLanes; }

  // By all lanes of the warp.
  static __device__ __forceinline__ Packet encode(const float (&values)[kValues], uint32_t groups, uint32_t c) {
    typename Lane::Word word;
    const uint32_t scale = Lane::encode(values, word);
    Packet packet = {as_codes(word), 0};
    const uint32_t first = c % kLanes * kScalesPerWord;  // group of this turn whose scale comes first in the word
    PT_UNROLL
    for (uint32_t s = 0; s < kScalesPerWord; ++s) {
      const uint32_t other = __shfl_sync(0xFFFFFFFFu, scale, (first + s) * kGroupLanes % kLanes);
      if (c / kLanes * kTurnGroups + first + s < groups) packet.scales |= other << (s * kScaleBits);
    }
    return packet;
  }
  template <typename Access>
  static __device__ __forceinline__ void store(uint32_t* row, uint32_t groups, uint32_t c, const Packet& packet) {
    Access::put(reinterpret_cast<Codes*>(row) + c, packet.codes);
    const uint32_t word = c / kLanes * kTurnScaleWords + c % kLanes;
    if (c % kLanes < kTurnScaleWords && word * kScalesPerWord < groups) {
      Access::put(row + groups * kGroupWords + word, packet.scales);
    }
  }
  template <typename Access>
  static __device__ __forceinline__ Packet load(const uint32_t* row, uint32_t groups, uint32_t c) {
    return {Access::get(reinterpret_cast<const Codes*>(row) + c),
            Access::get(row + groups * kGroupWords + c / kGroupLanes / kScalesPerWord)};
  }
  static __device__ __forceinline__ bool is_missing(const Packet& packet) {
    return packet.scales == kSentinel || is_sentinel(packet.codes);
  }
  static __device__ __forceinline__ void decode(const Packet& packet, uint32_t, uint32_t c, float (&values)[kValues]) {
    const uint32_t at = c / kGroupLanes % kScalesPerWord * kScaleBits;
    Lane::decode(as_word(packet.codes), static_cast<Scale>(packet.scales >> at), values);
  }

 private:
  static __device__ __forceinline__ Pair as_codes(uint2 word) { return {{word.x, word.y}}; }
  static __device__ __forceinline__ uint32_t as_codes(uint32_t word) { return word; }
  static __device__ __forceinline__ uint2 as_word(Pair codes) { return make_uint2(codes.word[0], codes.word[1]); }
  static __device__ __forceinline__ uint32_t as_word(uint32_t codes) { return codes; }
  static __device__ __forceinline__ bool is_sentinel(Pair codes) {
    return codes.word[0] == kSentinel || codes.word[1] == kSentinel;
  }
  static __device__ __forceinline__ bool is_sentinel(uint32_t codes) { return codes == kSentinel; }
};

}  // namespace
}  // namespace pt::cuda_fusion
