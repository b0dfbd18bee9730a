// SPDX-License-Identifier: Apache-2.0
// The formats: every code, rounding against a search over all codes, the word that never occurs, instruction sets.
#include <algorithm>
#include <cmath>

#include "codec_cases.h"

using namespace pt;
using namespace pt::codecs;

namespace {

constexpr Scaling kUnit = {1.0f, 0xFFFFFFFFu};

template <typename Codec>
bool occurs(uint32_t code) {
  const uint32_t sign = 1u << (Codec::kCodeBits - 1);
  return code != sign && !(Codec::kId == PT_CODEC_FP8 && (code & 0x7Fu) == 0x7Fu);
}

double e4m3(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15u), mantissa = static_cast<int>(code & 7u);
  const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80u ? -size : size;
}

double e2m1(uint32_t code) {
  static constexpr double kSizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8u ? -kSizes[code & 7u] : kSizes[code & 7u];
}

double two_complement(uint32_t code, uint32_t sign) {
  return static_cast<double>(static_cast<int>(code ^ sign) - static_cast<int>(sign));
}

template <typename Codec>
double meaning(uint32_t code) {
  if (Codec::kId == PT_CODEC_FP8) return e4m3(code);
  if (Codec::kId == PT_CODEC_MXFP4) return e2m1(code);
  return two_complement(code, 1u << (Codec::kCodeBits - 1));
}

template <typename Codec>
void codes_mean_what_their_format_says() {
  for (uint32_t code = 0; code < 1u << Codec::kCodeBits; ++code) {
    if (!occurs<Codec>(code)) continue;
    CHECK(static_cast<double>(Codec::decode(code)) == meaning<Codec>(code));
    CHECK(Codec::encode(Codec::decode(code), kUnit) == code);
  }
}

// The nearest code, of two equally near ones the even: found by looking at all of them.
template <typename Codec>
uint32_t nearest(double value) {
  uint32_t best = 0;
  double distance = std::fabs(value);
  for (uint32_t code = 1; code < 1u << Codec::kCodeBits; ++code) {
    if (!occurs<Codec>(code)) continue;
    const double found = std::fabs(meaning<Codec>(code) - value);
    if (found < distance || (found == distance && code % 2 == 0)) {
      best = code;
      distance = found;
    }
  }
  return best;
}

template <typename Codec>
void values_get_the_nearest_code() {
  std::mt19937 random(5);
  for (uint32_t code = 0; code < 1u << Codec::kCodeBits; ++code) {
    for (uint32_t other = 0; other < 1u << Codec::kCodeBits; ++other) {  // among them all neighbours: exact ties
      if (!occurs<Codec>(code) || !occurs<Codec>(other)) continue;
      const float middle = 0.5f * Codec::decode(code) + 0.5f * Codec::decode(other);
      for (const float value : {middle, std::nextafterf(middle, 1e9f), std::nextafterf(middle, -1e9f)}) {
        CHECK(Codec::encode(value, kUnit) == nearest<Codec>(value));
      }
    }
    if (code % 16 != 0) continue;
    for (int i = 0; i < 200; ++i) {
      const float spread = std::ldexp(1.0f, -static_cast<int>(random() % 12));
      const float value = (static_cast<float>(random()) / 2147483648.0f - 1.0f) * Codec::decode(code | 7u) * spread;
      if (std::isfinite(value)) CHECK(Codec::encode(value, kUnit) == nearest<Codec>(value));
    }
  }
}

// The largest value of a group is encoded within half a step, whatever its mantissa; scales are exact at the borders.
template <typename Codec>
void scales_fit_their_groups() {
  for (uint32_t bits = kSmallestBits; bits < kTooLargeBits; bits += 99991) {
    const float largest = as_float(bits);
    const auto scale = Codec::scale_for(bits);
    CHECK(scale != Codec::kNanScale);
    const float decoded = Codec::decode(Codec::encode(largest, scaling_of<Codec>(scale))) * Codec::scale_value(scale);
    const double bound = Codec::kId == PT_CODEC_INT8   ? 0.51 / 127
                         : Codec::kId == PT_CODEC_INT4 ? 0.51 / 7
                         : Codec::kId == PT_CODEC_FP8  ? 1.0 / 16
                                                       : 1.0 / 5;
    CHECK(std::isnormal(decoded) && std::fabs(decoded - largest) <= bound * largest);
  }
  CHECK(Codec::scale_value(Codec::scale_for(0)) == 1.0f);
  CHECK(Codec::scale_value(Codec::scale_for(kSmallestBits - 1)) == 1.0f);
  CHECK(std::isnan(Codec::scale_value(Codec::scale_for(kTooLargeBits))));
  CHECK(std::isnan(Codec::scale_value(Codec::scale_for(0x7F800000u))));
  CHECK(std::isnan(Codec::scale_value(Codec::scale_for(0x7FFFFFFFu))));
}

// Of any bits whatever, no 32-bit word of the message is the sentinel, and groups with NaN or infinity are NaN.
void no_word_is_the_sentinel(int codec) {
  std::mt19937 random(codec);
  const size_t rows = 4, hidden = 1024 + 40;
  for (int round = 0; round < 300; ++round) {
    std::vector<float> x(rows * hidden), y(x.size());
    // Small ranges of exponents: the codes of signs and zeros, and scales next to one another, come often.
    const auto low = static_cast<uint32_t>(random() % 255), span = static_cast<uint32_t>(random() % 4 + 1);
    for (float& value : x) {
      const uint32_t exponent = std::min(255u, low + static_cast<uint32_t>(random() % span));
      value = as_float((static_cast<uint32_t>(random()) & 0x807FFFFFu) | exponent << 23);
      if (random() % 8 == 0) value = as_float(static_cast<uint32_t>(random()) & 0x80000000u);
    }
    std::vector<uint32_t> message(pt_codec_encoded_bytes(codec, rows, hidden) / 4);
    CHECK(pt_codec_encode(codec, x.data(), nullptr, PT_FLOAT32, rows, hidden, message.data()) == PT_OK);
    for (const uint32_t word : message) CHECK(word != kSentinel);
    CHECK(pt_codec_decode(codec, message.data(), rows, hidden, y.data()) == PT_OK);
    for (size_t i = 0; i < x.size(); ++i) CHECK(std::isfinite(x[i]) || std::isnan(y[i]));
  }
}

template <typename Codec>
void check_codec() {
  codes_mean_what_their_format_says<Codec>();
  values_get_the_nearest_code<Codec>();
  scales_fit_their_groups<Codec>();
  no_word_is_the_sentinel(Codec::kId);
}

void bad_arguments_are_refused() {
  float x[4] = {};
  uint8_t message[64];
  CHECK(pt_codec_encoded_bytes(PT_CODEC_NONE, 1, 4) == 0 && pt_codec_encoded_bytes(9, 1, 4) == 0);
  CHECK(pt_codec_encode(9, x, nullptr, PT_FLOAT32, 1, 4, message) == PT_INVALID_ARGUMENT);
  CHECK_CONTAINS(pt_last_error(), "encode: codec is 9, expected 1 (int8), 2 (fp8), 3 (int4), 4 (mxfp4)");
  CHECK(pt_codec_encode(PT_CODEC_INT8, x, nullptr, 7, 1, 4, message) == PT_INVALID_ARGUMENT);
  CHECK(pt_codec_encode(PT_CODEC_INT8, x, nullptr, PT_FLOAT32, 1, 0, message) == PT_INVALID_ARGUMENT);
  CHECK(pt_codec_decode(PT_CODEC_INT8, nullptr, 1, 4, x) == PT_INVALID_ARGUMENT);
  CHECK(pt_codec_encode(PT_CODEC_INT8, nullptr, nullptr, PT_FLOAT32, 0, 4, nullptr) == PT_OK);
}

}  // namespace

int main() {
  check_codec<Int8>();
  check_codec<Int4>();
  check_codec<Fp8>();
  check_codec<Mxfp4>();
  bad_arguments_are_refused();
#if defined(PT_HAVE_X86_KERNELS)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) {
    std::puts("skipped the AVX2 half: this processor has no AVX2");
    return testing::kSkip;
  }
  testing::check_same_codec_bits(baseline::kKernels, avx2::kKernels);
#endif
}
