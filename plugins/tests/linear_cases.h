// SPDX-License-Identifier: Apache-2.0
// Random weights of every kind with their float64 meaning, and the checks one kernel table has to pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "linear/kernels.h"
#include "linear/linear.h"

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)
#define CHECK_CONTAINS(text, part) CHECK(std::string(text).find(part) != std::string::npos)

namespace pt::testing {

constexpr int kSkip = 77;

inline size_t dtype_bytes(int dtype) { return dtype == PT_LINEAR_X_FLOAT32 ? 4 : 2; }

// Rounds to `dtype`, returns what was stored. Halves are kept to few digits, so that plain truncation is exact.
inline double put(std::vector<uint8_t>& data, size_t i, int dtype, float value) {
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if (dtype == PT_LINEAR_X_FLOAT32) {
    std::memcpy(data.data() + 4 * i, &bits, 4);
    return value;
  }
  bits &= 0xFFFF0000u;
  const float kept = __builtin_bit_cast(float, bits);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  double stored = kept;
  if (dtype == PT_LINEAR_X_FLOAT16) {
    const int exponent = static_cast<int>(bits >> 23 & 255) - 112;  // bfloat16's seven digits fit into ten
    const bool fits = exponent >= 1 && exponent <= 30;
    half = static_cast<uint16_t>((bits >> 16 & 0x8000u) | (fits ? exponent << 10 | (bits >> 13 & 0x3FFu) : 0));
    if (!fits) stored = 0;
  }
  std::memcpy(data.data() + 2 * i, &half, 2);
  return stored;
}

inline double get(const std::vector<uint8_t>& data, size_t i, int dtype) {
  if (dtype == PT_LINEAR_X_FLOAT32) {
    float value;
    std::memcpy(&value, data.data() + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, data.data() + 2 * i, 2);
  if (dtype == PT_LINEAR_X_BFLOAT16) return __builtin_bit_cast(float, static_cast<uint32_t>(half) << 16);
  const int exponent = half >> 10 & 31, digits = half & 0x3FF;
  const double magnitude = exponent == 0    ? std::ldexp(digits, -24)
                           : exponent == 31 ? (digits != 0 ? std::nan("") : HUGE_VAL)
                                            : std::ldexp(1024 + digits, exponent - 25);
  return half & 0x8000 ? -magnitude : magnitude;
}

struct Case {
  std::vector<uint8_t> weights, scale, zero;
  std::vector<double> meaning;  // [out, in]
  pt_linear_weight weight{};
};

// Scales are 0 for every seventh row or group.
inline Case make_case(int kind, int scale_dtype, size_t out, size_t in, size_t group) {
  std::mt19937 random(static_cast<unsigned>(kind * 1000 + out * 10 + in));
  std::normal_distribution<float> normal;
  Case c;
  const size_t groups = kind == PT_LINEAR_INT4 ? in / group : 1;
  c.meaning.resize(out * in);
  c.weights.resize(out * in * (kind == PT_LINEAR_FLOAT32 ? 4 : kind <= PT_LINEAR_FLOAT16 ? 2 : 1));
  c.scale.resize(out * groups * 4);
  c.zero.resize(out * groups * 4);
  for (size_t o = 0; o < out; ++o) {
    for (size_t i = 0; i < in; ++i) {
      const size_t at = o * in + i;
      if (kind <= PT_LINEAR_FLOAT16) {
        c.meaning[at] = put(c.weights, at, kind, normal(random) * 0.1f);
      } else if (kind == PT_LINEAR_INT8) {
        if (i == 0) put(c.scale, o, scale_dtype, o % 7 == 3 ? 0.0f : 0.001f + 0.0001f * static_cast<float>(o));
        const auto q = static_cast<int8_t>(random() % 256 - 128);
        c.weights[at] = static_cast<uint8_t>(q);
        c.meaning[at] = q * get(c.scale, o, scale_dtype);
      } else {
        const size_t g = o * groups + i / group;
        if (i % group == 0) {
          put(c.scale, g, scale_dtype, g % 7 == 3 ? 0.0f : std::fabs(normal(random)) * 0.02f);
          put(c.zero, g, scale_dtype, normal(random) * 0.05f);
        }
        const unsigned q = random() % 16;
        if (at % 2 == 0) c.weights[at / 2] = 0;
        c.weights[at / 2] |= static_cast<uint8_t>(q << (at % 2 * 4));
        c.meaning[at] = (static_cast<int>(q) - 8) * get(c.scale, g, scale_dtype) + get(c.zero, g, scale_dtype);
      }
    }
  }
  const bool scaled = kind >= PT_LINEAR_INT8, zeroed = kind == PT_LINEAR_INT4;
  c.weight = {c.weights.data(),
              scaled ? c.scale.data() : nullptr,
              zeroed ? c.zero.data() : nullptr,
              out,
              in,
              zeroed ? group : 0,
              kind,
              scale_dtype};
  return c;
}

inline std::vector<uint8_t> run(const linear::Kernels& kernels, const Case& c, const std::vector<uint8_t>& x,
                                size_t first, size_t rows, int dtype, int threads, const void* bias = nullptr) {
  // Exactly as large as needed, so that a sanitizer sees reads and writes outside.
  const size_t row_bytes = c.weight.in * dtype_bytes(dtype);
  const std::vector<uint8_t> here(x.begin() + static_cast<std::ptrdiff_t>(first * row_bytes),
                                  x.begin() + static_cast<std::ptrdiff_t>((first + rows) * row_bytes));
  std::vector<uint8_t> y(rows * c.weight.out * dtype_bytes(dtype));
  linear::run_product(kernels, {&c.weight, nullptr, here.data(), bias, y.data(), rows, dtype}, threads);
  return y;
}

inline void check_case(const linear::Kernels& kernels, const Case& c, int dtype) {
  constexpr size_t kRows = 17;
  const size_t out = c.weight.out, in = c.weight.in;
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> x(kRows * in * dtype_bytes(dtype)), bias(out * dtype_bytes(dtype));
  std::vector<double> x_meaning(kRows * in), bias_meaning(out);
  for (size_t i = 0; i < kRows * in; ++i) {
    // One outlier per row, a row of zeros.
    const float value = i / in == 5 ? 0.0f : normal(random) * (i % in == 7 ? 100.0f : 1.0f);
    x_meaning[i] = put(x, i, dtype, value);
  }
  for (size_t o = 0; o < out; ++o) bias_meaning[o] = put(bias, o, dtype, normal(random));
  const auto y = run(kernels, c, x, 0, kRows, dtype, 1), biased = run(kernels, c, x, 0, kRows, dtype, 1, bias.data());
  const double step = dtype == PT_LINEAR_X_FLOAT32 ? 0x1p-24 : dtype == PT_LINEAR_X_BFLOAT16 ? 0x1p-8 : 0x1p-11;
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t o = 0; o < out; ++o) {
      double sum = 0, magnitude = 0, largest = 0, weights = 0;
      for (size_t i = 0; i < in; ++i) {
        const double term = x_meaning[row * in + i] * c.meaning[o * in + i];
        sum += term;
        magnitude += std::fabs(term);
        largest = std::max(largest, std::fabs(x_meaning[row * in + i]));
        weights += std::fabs(c.meaning[o * in + i]);
      }
      // float32 accumulation; for integer weights the rounding of x, and for int4 that of the zero term.
      double bound = 0x1p-20 * magnitude + 1e-30;
      if (c.weight.kind >= PT_LINEAR_INT8) {
        bound += (dtype == PT_LINEAR_X_FLOAT32 ? 0x1p-23 : 0x1p-15) * largest * weights + 0x1p-18 * largest;
      }
      const double found = get(y, row * out + o, dtype), with_bias = get(biased, row * out + o, dtype);
      const double wanted = sum + bias_meaning[o];
      if (!(std::fabs(found - sum) <= bound + step * std::fabs(sum)) ||
          !(std::fabs(with_bias - wanted) <= bound + step * std::fabs(wanted) + 0x1p-22)) {
        std::fprintf(stderr, "%s kind %d dtype %d [%zu, %zu] group %zu: y[%zu, %zu] is %g, expected %g +- %g\n",
                     kernels.name, c.weight.kind, dtype, out, in, c.weight.group_size, row, o, found, sum, bound);
        std::exit(1);
      }
    }
  }
  const size_t row_bytes = out * dtype_bytes(dtype);
  for (size_t rows = 1; rows <= kRows; ++rows) {
    const size_t first = kRows - rows;
    for (int threads : {1, 2, 3}) {
      const auto part = run(kernels, c, x, first, rows, dtype, threads);
      CHECK(std::memcmp(part.data(), y.data() + first * row_bytes, part.size()) == 0);
    }
  }
}

// NaN and infinity reach the output; tiny and huge rows keep their scale.
inline void check_extremes(const linear::Kernels& kernels, int kind) {
  const Case c = make_case(kind, PT_LINEAR_X_FLOAT32, 13, 160, 32);
  std::vector<uint8_t> x(4 * c.weight.in * 4);
  for (size_t i = 0; i < c.weight.in; ++i) {
    put(x, i, 0, 1.0f);
    put(x, c.weight.in + i, 0, i == 77 ? std::nanf("") : 1.0f);
    put(x, 2 * c.weight.in + i, 0, 0x1p-100f);
    put(x, 3 * c.weight.in + i, 0, 0x1p100f);
  }
  const auto y = run(kernels, c, x, 0, 4, PT_LINEAR_X_FLOAT32, 1);
  for (size_t o = 0; o < c.weight.out; ++o) {
    const double one = get(y, o, 0);
    CHECK(std::isfinite(one));
    CHECK(std::isnan(get(y, c.weight.out + o, 0)));
    CHECK(get(y, 2 * c.weight.out + o, 0) == std::ldexp(one, -100));
    CHECK(get(y, 3 * c.weight.out + o, 0) == std::ldexp(one, 100));
  }
}

inline void check_swiglu(const linear::Kernels& kernels, int kind) {
  constexpr size_t kRows = 8;  // enough work that two threads share it
  const Case gate = make_case(kind, PT_LINEAR_X_FLOAT32, 201, 96, 32), up = make_case(kind, 0, 201, 96, 32);
  std::vector<uint8_t> x(kRows * 96 * 4);
  for (size_t i = 0; i < kRows * 96; ++i) put(x, i, 0, std::sin(static_cast<float>(i)));
  const auto g = run(kernels, gate, x, 0, kRows, 0, 1), u = run(kernels, up, x, 0, kRows, 0, 1);
  std::vector<uint8_t> y(kRows * 201 * 4);
  linear::run_product(kernels, {&gate.weight, &up.weight, x.data(), nullptr, y.data(), kRows, 0}, 2);
  for (size_t i = 0; i < kRows * 201; ++i) {
    const double a = get(g, i, 0), wanted = a / (1 + std::exp(-a)) * get(u, i, 0);
    CHECK(std::fabs(get(y, i, 0) - wanted) <= 1e-6 * std::fabs(wanted) + 1e-7);
  }
}

inline void check_dequantize(const linear::Kernels& kernels, const Case& c) {
  const size_t first = c.weight.out / 3, count = c.weight.out - first;
  std::vector<uint8_t> values(count * c.weight.in * 4);
  kernels.dequantize(&c.weight, first, c.weight.out, PT_LINEAR_X_FLOAT32, values.data());
  for (size_t i = 0; i < count * c.weight.in; ++i) {
    // Product and sum are rounded to float32.
    const double found = get(values, i, 0), wanted = c.meaning[first * c.weight.in + i];
    CHECK(std::fabs(found - wanted) <= (c.weight.kind <= PT_LINEAR_FLOAT16 ? 0 : 1e-7));
  }
}

inline void check_table(const linear::Kernels& kernels) {
  struct Shape {
    size_t out, in;
  };
  for (int kind = PT_LINEAR_FLOAT32; kind <= PT_LINEAR_INT4; ++kind) {
    for (const Shape& shape : {Shape{1, 32}, Shape{13, 160}, Shape{50, 1056}, Shape{7, 2208}, Shape{26, 2304}}) {
      for (size_t group : {32u, 128u}) {
        if (kind != PT_LINEAR_INT4 && group == 128) continue;
        if (shape.in % group != 0) continue;
        for (int dtype = 0; dtype < 3; ++dtype) {
          const Case c = make_case(kind, dtype, shape.out, shape.in, group);
          check_case(kernels, c, dtype);
          check_dequantize(kernels, c);
        }
      }
    }
    check_extremes(kernels, kind);
    check_swiglu(kernels, kind);
  }
}

}  // namespace pt::testing
