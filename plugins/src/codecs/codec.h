// SPDX-License-Identifier: Apache-2.0
// The four formats, value by value, for host and device. README.md has the contract.
//
// A group of kGroup fp32 values is encoded in three moves, so that they may be spread over the lanes of a warp:
//   largest = max over the group of magnitude_bits(value)
//   scale   = Codec::scale_for(largest);  scaling = scaling_of<Codec>(scale)
//   code    = Codec::encode(value, scaling)
// and decoded in two: Codec::decode(code) * Codec::scale_value(scale). That product is exact (or NaN), so it makes no
// difference whether a compiler contracts it with the addition that follows.
//
// Host code must be compiled with -ffp-contract=off. All in an unnamed namespace: this is compiled for several
// instruction sets, and the linker must not keep one copy for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "common/host_device.h"
#include "pt/codecs.h"

namespace pt::codecs {
namespace {

// Groups whose largest magnitude is below 2^-100 are zero: no product below ever meets an fp32 denormal.
constexpr uint32_t kSmallestBits = 27u << 23;
// From 2^126 on a decoded value could overflow; NaN and infinity lie above as well.
constexpr uint32_t kTooLargeBits = 253u << 23;
constexpr uint16_t kBfloat16One = 0x3F80;
constexpr uint16_t kBfloat16Nan = 0x7FC0;

PT_HOST_DEVICE float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

PT_HOST_DEVICE uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

// One rounding each, whatever nvcc's options say.
PT_HOST_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PT_HOST_DEVICE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

PT_HOST_DEVICE float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(value);
#else
  return 1.0f / value;
#endif
}

// Ordered like the magnitudes, with infinity and NaN on top.
PT_HOST_DEVICE uint32_t magnitude_bits(float value) { return as_bits(value) & 0x7FFFFFFFu; }

// Nearest even integer of |value| < 2^22, in the low bits, two's complement.
PT_HOST_DEVICE uint32_t round_to_int(float value) {
  constexpr float kAlign = 12582912.0f;  // 1.5 * 2^23: the unit of its last bit is 1
  return as_bits(add(value, kAlign)) - as_bits(kAlign);
}

// bfloat16 nearest to largest / steps: the largest value of the group gets the code `steps`.
PT_HOST_DEVICE uint16_t bfloat16_scale(uint32_t largest, float one_over_steps) {
  const uint32_t bits = as_bits(multiply(as_float(largest), one_over_steps));
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  const uint16_t finite = largest < kSmallestBits ? kBfloat16One : rounded;
  return largest >= kTooLargeBits ? kBfloat16Nan : finite;
}

// How values of one group become codes.
struct Scaling {
  float inverse;  // multiplied with, then rounded
  uint32_t keep;  // all ones; 0 in a NaN group, whose codes are 0
};

// Codes -127 to 127: a byte is never 0x80.
struct Int8 {
  using Scale = uint16_t;
  static constexpr int kId = PT_CODEC_INT8;
  static constexpr size_t kGroup = 32;
  static constexpr size_t kCodeBits = 8;
  static constexpr Scale kNanScale = kBfloat16Nan;

  static PT_HOST_DEVICE Scale scale_for(uint32_t largest) { return bfloat16_scale(largest, 1.0f / 127.0f); }
  static PT_HOST_DEVICE float scale_value(Scale scale) { return as_float(static_cast<uint32_t>(scale) << 16); }
  static PT_HOST_DEVICE float inverse_of(Scale scale) { return reciprocal(scale_value(scale)); }
  static PT_HOST_DEVICE uint32_t encode(float value, Scaling scaling) {
    // The rounded scale can be too small by 2^-8: 127.5 becomes 127.
    const int32_t rounded = static_cast<int32_t>(round_to_int(multiply(value, scaling.inverse)) & scaling.keep);
    const int32_t low = rounded < -127 ? -127 : rounded;
    return static_cast<uint32_t>(low > 127 ? 127 : low) & 0xFFu;
  }
  static PT_HOST_DEVICE float decode(uint32_t code) { return static_cast<float>(static_cast<int8_t>(code)); }
};

// Codes -7 to 7: a nibble is never 8.
struct Int4 {
  using Scale = uint16_t;
  static constexpr int kId = PT_CODEC_INT4;
  static constexpr size_t kGroup = 32;
  static constexpr size_t kCodeBits = 4;
  static constexpr Scale kNanScale = kBfloat16Nan;

  static PT_HOST_DEVICE Scale scale_for(uint32_t largest) { return bfloat16_scale(largest, 1.0f / 7.0f); }
  static PT_HOST_DEVICE float scale_value(Scale scale) { return as_float(static_cast<uint32_t>(scale) << 16); }
  static PT_HOST_DEVICE float inverse_of(Scale scale) { return reciprocal(scale_value(scale)); }
  static PT_HOST_DEVICE uint32_t encode(float value, Scaling scaling) {
    // The rounded scale can be too small by 2^-8: 7.03 is 7 without a clamp.
    return round_to_int(multiply(value, scaling.inverse)) & scaling.keep & 0xFu;
  }
  static PT_HOST_DEVICE float decode(uint32_t code) { return static_cast<float>(static_cast<int32_t>(code ^ 8u) - 8); }
};

// e4m3 without infinity (largest 448). -0 becomes +0: a byte is never 0x80; NaN lives in the scale, so never 0x7F.
struct Fp8 {
  using Scale = uint16_t;
  static constexpr int kId = PT_CODEC_FP8;
  static constexpr size_t kGroup = 128;
  static constexpr size_t kCodeBits = 8;
  static constexpr Scale kNanScale = kBfloat16Nan;

  static PT_HOST_DEVICE Scale scale_for(uint32_t largest) { return bfloat16_scale(largest, 1.0f / 448.0f); }
  static PT_HOST_DEVICE float scale_value(Scale scale) { return as_float(static_cast<uint32_t>(scale) << 16); }
  static PT_HOST_DEVICE float inverse_of(Scale scale) { return reciprocal(scale_value(scale)); }
  static PT_HOST_DEVICE uint32_t encode(float value, Scaling scaling) {
    const float scaled = multiply(value, scaling.inverse);  // at most 449.75, which rounds to 448
    const uint32_t magnitude = magnitude_bits(scaled);
    const uint32_t normal = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
    // Below 2^-6 the step is 2^-9, the unit of the last bit of 2^14.
    const uint32_t subnormal = as_bits(add(as_float(magnitude), 16384.0f)) - as_bits(16384.0f);
    const uint32_t code = (magnitude < (121u << 23) ? subnormal : normal) & 0x7Fu & scaling.keep;
    return code == 0 ? 0 : code | ((as_bits(scaled) >> 24) & 0x80u & scaling.keep);
  }
  static PT_HOST_DEVICE float decode(uint32_t code) {
    const uint32_t magnitude = (code & 0x7Fu) << 20;
    const uint32_t normal = magnitude + (120u << 23);
    // 2^-6 + m * 2^-9 minus 2^-6 is exact and meets no fp32 denormal.
    const uint32_t subnormal = as_bits(add(as_float(magnitude + (121u << 23)), -as_float(121u << 23)));
    return as_float((magnitude < (1u << 23) ? subnormal : normal) | ((code & 0x80u) << 24));
  }
};

// OCP MXFP4: e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) and a power of two. -0 becomes +0: a nibble is never 8.
struct Mxfp4 {
  using Scale = uint8_t;
  static constexpr int kId = PT_CODEC_MXFP4;
  static constexpr size_t kGroup = 32;
  static constexpr size_t kCodeBits = 4;
  static constexpr Scale kNanScale = 0xFF;

  // The power of two that brings the largest value into [3.5, 7): what lies above 6 is within half a step of it. Never
  // 0 (three zero scales and 0x80 would be a word of kSentinel).
  static PT_HOST_DEVICE Scale scale_for(uint32_t largest) {
    const uint32_t exponent = ((largest + (1u << 21)) >> 23) - 2;
    const uint32_t finite = largest < kSmallestBits ? 127u : exponent;
    return static_cast<Scale>(largest >= kTooLargeBits ? 0xFFu : finite);
  }
  static PT_HOST_DEVICE float scale_value(Scale scale) {
    return as_float(scale == kNanScale ? 0x7FC00000u : static_cast<uint32_t>(scale) << 23);
  }
  static PT_HOST_DEVICE float inverse_of(Scale scale) {
    return as_float((254u - (scale == kNanScale ? 127u : scale)) << 23);
  }
  static PT_HOST_DEVICE uint32_t encode(float value, Scaling scaling) {
    const float scaled = multiply(value, scaling.inverse);
    const float size = as_float(magnitude_bits(scaled));
    // Thresholds halfway between two values; a tie goes to the even code.
    const uint32_t code = static_cast<uint32_t>((size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) +
                                                (size > 2.5f) + (size >= 3.5f) + (size > 5.0f)) &
                          scaling.keep;
    return code == 0 ? 0 : code | ((as_bits(scaled) >> 28) & 8u & scaling.keep);
  }
  static PT_HOST_DEVICE float decode(uint32_t code) {
    const uint32_t magnitude = code & 7u;
    const uint32_t normal = (magnitude << 22) + (126u << 23);
    const uint32_t subnormal = as_bits(add(as_float((magnitude << 22) + (127u << 23)), -1.0f));
    return as_float((magnitude < 2u ? subnormal : normal) | ((code & 8u) << 28));
  }
};

template <typename Codec>
PT_HOST_DEVICE Scaling scaling_of(typename Codec::Scale scale) {
  return {Codec::inverse_of(scale), scale == Codec::kNanScale ? 0u : 0xFFFFFFFFu};
}

}  // namespace
}  // namespace pt::codecs
