// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "codecs/group.h"
#include "gpu_check/ranks.h"

namespace pt::gpu_check {

std::vector<float> passed_through(int codec, const std::vector<float>& values, size_t hidden) {
  std::vector<float> result = values;
  codecs::with_codec(codec, [&](auto chosen) {
    using Codec = decltype(chosen);
    for (size_t row = 0; row < values.size(); row += hidden) {
      for (size_t column = 0; column < hidden; column += Codec::kGroup) {
        const size_t width = std::min<size_t>(Codec::kGroup, hidden - column);
        float group[Codec::kGroup] = {};
        uint8_t codes[codecs::Layout<Codec>::kCodeBytes], scale[codecs::Layout<Codec>::kScaleBytes];
        std::copy_n(values.data() + row + column, width, group);
        codecs::encode_group<Codec>(group, codes, scale);
        codecs::decode_group<Codec>(codes, scale, group);
        std::copy_n(group, width, result.data() + row + column);
      }
    }
  });
  return result;
}

size_t bytes_in_transit(int codec, size_t tokens, size_t hidden) {
  size_t bytes = tokens * hidden * 2;
  codecs::with_codec(codec, [&](auto chosen) {
    using Layout = codecs::Layout<decltype(chosen)>;
    bytes = tokens * Layout::encoded_bytes(Layout::groups_per_row(hidden));
  });
  return bytes;
}

}  // namespace pt::gpu_check
