// SPDX-License-Identifier: Apache-2.0
// Compares two kernel tables bit by bit on every type, on odd sizes and addresses, with every special value.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "track_fusion/call_record.h"
#include "track_fusion/kernels.h"

namespace pt::testing {

inline std::vector<uint8_t> random_elements(std::mt19937& random, int dtype, size_t count) {
  static constexpr uint32_t kFloatSpecials[] = {0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001,
                                                0xFFA00001, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x477FF000};
  const size_t bytes = track_fusion::dtype_bytes(dtype);
  std::vector<uint8_t> data(count * bytes + 1);  // one spare byte: callers shift by one to misalign
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    if (random() % 16 == 0) {
      bits = bytes == 2 ? random() & 0xFFFF : kFloatSpecials[random() % std::size(kFloatSpecials)];
    } else {
      const float value = normal(random);
      std::memcpy(&bits, &value, 4);
      if (dtype == PT_BFLOAT16) bits >>= 16;
      if (dtype == PT_FLOAT16) bits = 0x3000 + (random() % 0x1000) + (random() % 2 ? 0x8000 : 0);
    }
    std::memcpy(data.data() + i * bytes, &bits, bytes);
  }
  return data;
}

inline void check_same_bits(const track_fusion::Kernels& a, const track_fusion::Kernels& b) {
  std::mt19937 random(7);
  for (int dtype = 0; dtype < 3; ++dtype) {
    const size_t bytes = track_fusion::dtype_bytes(dtype);
    for (size_t count : {0u, 1u, 7u, 16u, 33u, 255u, 256u, 257u, 1000u}) {
      for (size_t shift : {0u, 1u}) {
        std::vector<std::vector<uint8_t>> inputs;
        const void* sources[5];
        for (int rank = 0; rank < 5; ++rank) inputs.push_back(random_elements(random, dtype, count + 1));
        for (int rank = 0; rank < 5; ++rank) sources[rank] = inputs[rank].data() + shift;
        const void* residual = sources[4];
        const size_t room = count * bytes;
        std::vector<uint8_t> out_a(room + 1), out_b(room + 1);
        for (const void* added : {static_cast<const void*>(nullptr), residual}) {
          a.reduce[dtype](sources, 4, added, 0.25f, out_a.data() + shift, count);
          b.reduce[dtype](sources, 4, added, 0.25f, out_b.data() + shift, count);
          CHECK(out_a == out_b);
        }
        std::vector<float> mean_a(count), mean_b(count);
        a.reduce_to_float[dtype](sources, 3, 1.0f / 3.0f, mean_a.data(), count);
        b.reduce_to_float[dtype](sources, 3, 1.0f / 3.0f, mean_b.data(), count);
        CHECK(std::memcmp(mean_a.data(), mean_b.data(), count * sizeof(float)) == 0);
        a.add_residual[dtype](mean_a.data(), residual, out_a.data() + shift, count);
        b.add_residual[dtype](mean_b.data(), residual, out_b.data() + shift, count);
        CHECK(out_a == out_b);
        if (count == 0) continue;
        const auto finite = [&](size_t n, int type) {
          std::vector<uint8_t> data(n * track_fusion::dtype_bytes(type));
          for (size_t i = 0; i < n; ++i) {
            const float value = static_cast<float>(random() % 4096) / 2048.0f - 1.0f;
            const uint32_t raw = __builtin_bit_cast(uint32_t, value);
            const uint16_t half = static_cast<uint16_t>(type == PT_FLOAT16 ? random() % 0x4000 : raw >> 16);
            if (type == PT_FLOAT32) {
              std::memcpy(data.data() + i * 4, &raw, 4);
            } else {
              std::memcpy(data.data() + i * 2, &half, 2);
            }
          }
          return data;
        };
        for (int gamma_is_float = 0; gamma_is_float < 2; ++gamma_is_float) {
          const auto h = finite(3 * count, dtype);
          const auto gamma = finite(2 * count, gamma_is_float ? static_cast<int>(PT_FLOAT32) : dtype);
          std::vector<uint8_t> norm_a(2 * 3 * count * bytes), norm_b(norm_a.size());
          a.rms_norm[dtype][gamma_is_float](h.data(), gamma.data(), 2, 1e-5f, norm_a.data(), 3 * count, 3, count);
          b.rms_norm[dtype][gamma_is_float](h.data(), gamma.data(), 2, 1e-5f, norm_b.data(), 3 * count, 3, count);
          CHECK(norm_a == norm_b);
        }
      }
    }
  }
}

}  // namespace pt::testing
