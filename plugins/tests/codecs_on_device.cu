// SPDX-License-Identifier: Apache-2.0
// The device's bytes and values against the host's, bit by bit, on shapes with cut groups and with every special value.
// Then the time of each codec. Prints one JSON object; exits 0, 1 (a difference) or 77 (no CUDA device).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "codecs/device.h"
#include "pt/codecs.h"

namespace {

constexpr const char* kNames[] = {"none", "int8", "fp8", "int4", "mxfp4"};
constexpr size_t kShapes[][2] = {{1, 1}, {3, 40}, {5, 200}, {1, 2048}, {17, 1000}, {64, 4096}};

#define CUDA_CHECK(call)                                                                              \
  do {                                                                                                \
    const cudaError_t status = (call);                                                                \
    if (status != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (false)

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) { CUDA_CHECK(cudaMalloc(&data_, bytes + 1)); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Groups of widely different sizes, one value in sixteen special.
std::vector<uint32_t> random_bits(std::mt19937& random, size_t count, int dtype) {
  static constexpr uint32_t kSpecials[] = {0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00001,
                                           0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x0D800000, 0x7E800000};
  std::vector<uint32_t> bits(count);
  for (size_t i = 0; i < count; ++i) {
    const uint32_t exponent = static_cast<uint32_t>(64 + (i / 32 * 7919) % 120 + random() % 4);
    bits[i] = (static_cast<uint32_t>(random()) & 0x807FFFFFu) | exponent << 23;
    if (i / 32 % 4 == 0 && random() % 16 == 0) bits[i] = kSpecials[random() % 10];
    if (dtype == PT_FLOAT16) bits[i] = static_cast<uint32_t>(random()) << 16;
  }
  return bits;
}

// `bits` as `dtype`: the upper halves are bfloat16 values, and any bits are half values.
std::vector<uint8_t> stored(const std::vector<uint32_t>& bits, int dtype) {
  std::vector<uint8_t> bytes(bits.size() * (dtype == PT_FLOAT32 ? 4 : 2));
  for (size_t i = 0; i < bits.size(); ++i) {
    const auto upper = static_cast<uint16_t>(bits[i] >> 16);
    if (dtype == PT_FLOAT32) {
      std::memcpy(&bytes[i * 4], &bits[i], 4);
    } else {
      std::memcpy(&bytes[i * 2], &upper, 2);
    }
  }
  return bytes;
}

// NaN compares equal to NaN: its payload is not part of the format.
bool same_values(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != a[i] && b[i] != b[i]) continue;
    if (std::memcmp(&a[i], &b[i], 4) != 0) return false;
  }
  return true;
}

size_t count_differences(int codec, int dtype, size_t rows, size_t hidden, bool delta, std::mt19937& random) {
  const size_t count = rows * hidden, bytes = pt_codec_encoded_bytes(codec, rows, hidden);
  const auto x = stored(random_bits(random, count, dtype), dtype),
             base = stored(random_bits(random, count, dtype), dtype);
  std::vector<uint8_t> host(bytes), device(bytes, 0xEE);
  std::vector<float> host_values(count), device_values(count);
  const void* known = delta ? base.data() : nullptr;
  if (pt_codec_encode(codec, x.data(), known, dtype, rows, hidden, host.data()) != PT_OK ||
      pt_codec_decode(codec, host.data(), rows, hidden, host_values.data()) != PT_OK) {
    std::fprintf(stderr, "%s\n", pt_last_error());
    std::exit(1);
  }
  const DeviceBuffer x_there(x.size()), base_there(base.size()), message(bytes), values(count * 4);
  CUDA_CHECK(cudaMemcpy(x_there.get(), x.data(), x.size(), cudaMemcpyHostToDevice));
  CUDA_CHECK(cudaMemcpy(base_there.get(), base.data(), base.size(), cudaMemcpyHostToDevice));
  CUDA_CHECK(cudaMemset(message.get(), 0xEE, bytes));
  CUDA_CHECK(pt::codecs::encode_on_device(codec, x_there.get(), delta ? base_there.get() : nullptr, dtype, rows, hidden,
                                          message.get(), nullptr));
  CUDA_CHECK(
      pt::codecs::decode_on_device(codec, message.get(), rows, hidden, static_cast<float*>(values.get()), nullptr));
  CUDA_CHECK(cudaMemcpy(device.data(), message.get(), bytes, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaMemcpy(device_values.data(), values.get(), count * 4, cudaMemcpyDeviceToHost));
  return (host == device ? 0 : 1) + (same_values(host_values, device_values) ? 0 : 1);
}

// Microseconds of one encode and one decode of bfloat16 [1024, 8192], in steady state.
void measure(int codec, float& encode_us, float& decode_us) {
  const size_t rows = 1024, hidden = 8192, count = rows * hidden;
  const DeviceBuffer x(count * 2), message(pt_codec_encoded_bytes(codec, rows, hidden)), values(count * 4);
  CUDA_CHECK(cudaMemset(x.get(), 0x3F, count * 2));
  cudaEvent_t events[3];
  for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventCreate(&event));
  constexpr int kRepeats = 100;
  for (int warm = 0; warm < 2; ++warm) {
    CUDA_CHECK(cudaEventRecord(events[0]));
    for (int i = 0; i < kRepeats; ++i) {
      CUDA_CHECK(
          pt::codecs::encode_on_device(codec, x.get(), nullptr, PT_BFLOAT16, rows, hidden, message.get(), nullptr));
    }
    CUDA_CHECK(cudaEventRecord(events[1]));
    for (int i = 0; i < kRepeats; ++i) {
      CUDA_CHECK(
          pt::codecs::decode_on_device(codec, message.get(), rows, hidden, static_cast<float*>(values.get()), nullptr));
    }
    CUDA_CHECK(cudaEventRecord(events[2]));
    CUDA_CHECK(cudaEventSynchronize(events[2]));
  }
  CUDA_CHECK(cudaEventElapsedTime(&encode_us, events[0], events[1]));
  CUDA_CHECK(cudaEventElapsedTime(&decode_us, events[1], events[2]));
  encode_us *= 1e3f / kRepeats;
  decode_us *= 1e3f / kRepeats;
  for (const cudaEvent_t event : events) CUDA_CHECK(cudaEventDestroy(event));
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("{\"skipped\": \"no CUDA device\"}");
    return 77;
  }
  std::mt19937 random(23);
  size_t all_cases = 0, all_differences = 0;
  std::printf("{\"codecs\": {");
  for (int codec = PT_CODEC_INT8; codec <= PT_CODEC_MXFP4; ++codec) {
    size_t cases = 0, differences = 0;
    for (int dtype = PT_FLOAT32; dtype <= PT_FLOAT16; ++dtype) {
      for (const auto& shape : kShapes) {
        for (const bool delta : {false, true}) {
          differences += count_differences(codec, dtype, shape[0], shape[1], delta, random);
          ++cases;
        }
      }
    }
    float encode_us = 0, decode_us = 0;
    measure(codec, encode_us, decode_us);
    std::printf("%s\"%s\": {\"cases\": %zu, \"differences\": %zu, \"encode_us_of_16_mib\": %.2f, \"decode_us\": %.2f}",
                codec == PT_CODEC_INT8 ? "" : ", ", kNames[codec], cases, differences, static_cast<double>(encode_us),
                static_cast<double>(decode_us));
    all_cases += cases;
    all_differences += differences;
  }
  std::printf("}, \"cases\": %zu, \"differences\": %zu}\n", all_cases, all_differences);
  return all_differences == 0 ? 0 : 1;
}
