// SPDX-License-Identifier: Apache-2.0
// Packets of codes as one host thread makes them: the groups whose scales share a word, by the CPU's own codecs.
#pragma once

#include <algorithm>
#include <iterator>

#include "codecs/group.h"

namespace pt::cuda_fusion {

template <typename Codec>
struct HostCoder {
  using Scale = typename Codec::Scale;
  static constexpr uint32_t kLanes = 1;
  static constexpr uint32_t kGroup = Codec::kGroup;
  static constexpr uint32_t kGroups = sizeof(uint32_t) / sizeof(Scale);  // in a packet, fewer at the end of a row
  static constexpr int kValues = static_cast<int>(kGroup * kGroups);
  static constexpr uint32_t kGroupWords = codecs::Layout<Codec>::kCodeBytes / sizeof(uint32_t);

  struct Packet {
    uint32_t codes[kGroups * kGroupWords];
    uint32_t scales;
  };

  static uint32_t packets(uint32_t groups) { return (groups + kGroups - 1) / kGroups; }

  static Packet encode(const float* values, uint32_t groups, uint32_t c) {
    Packet packet = {};
    for (uint32_t g = 0; g < groups_in(groups, c); ++g) {
      codecs::encode_group<Codec>(values + g * kGroup, reinterpret_cast<uint8_t*>(packet.codes + g * kGroupWords),
                                  reinterpret_cast<uint8_t*>(&packet.scales) + g * sizeof(Scale));
    }
    return packet;
  }
  template <typename Access>
  static void store(uint32_t* row, uint32_t groups, uint32_t c, const Packet& packet) {
    uint32_t* codes = row + c * kGroups * kGroupWords;
    for (uint32_t w = 0; w < groups_in(groups, c) * kGroupWords; ++w) Access::put(codes + w, packet.codes[w]);
    Access::put(row + groups * kGroupWords + c, packet.scales);
  }
  template <typename Access>
  static Packet load(const uint32_t* row, uint32_t groups, uint32_t c) {
    Packet packet = {};
    const uint32_t* codes = row + c * kGroups * kGroupWords;
    for (uint32_t w = 0; w < groups_in(groups, c) * kGroupWords; ++w) packet.codes[w] = Access::get(codes + w);
    packet.scales = Access::get(row + groups * kGroupWords + c);
    return packet;
  }
  static bool is_missing(const Packet& packet) {
    return packet.scales == codecs::kSentinel ||
           std::find(std::begin(packet.codes), std::end(packet.codes), codecs::kSentinel) != std::end(packet.codes);
  }
  static void decode(const Packet& packet, uint32_t groups, uint32_t c, float* values) {
    std::fill_n(values, kValues, 0.0f);
    for (uint32_t g = 0; g < groups_in(groups, c); ++g) {
      codecs::decode_group<Codec>(reinterpret_cast<const uint8_t*>(packet.codes + g * kGroupWords),
                                  reinterpret_cast<const uint8_t*>(&packet.scales) + g * sizeof(Scale),
                                  values + g * kGroup);
    }
  }

 private:
  static uint32_t groups_in(uint32_t groups, uint32_t c) { return std::min(kGroups, groups - c * kGroups); }
};

}  // namespace pt::cuda_fusion
