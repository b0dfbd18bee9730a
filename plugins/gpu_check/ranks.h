// SPDX-License-Identifier: Apache-2.0
// n ranks on one GPU: their tensors, and what must come out.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/numeric.h"
#include "pt/codecs.h"
#include "pt/cuda_fusion.h"

#define GPU(call)                                                                                     \
  do {                                                                                                \
    const cudaError_t error_ = (call);                                                                \
    if (error_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (false)

namespace pt::gpu_check {

inline uint64_t fnv1a(const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return hash;
}

// The CPU's codecs: [tokens, hidden] encoded and decoded, and the bytes that travel.
std::vector<float> passed_through(int codec, const std::vector<float>& values, size_t hidden);
size_t bytes_in_transit(int codec, size_t tokens, size_t hidden);

// bfloat16 tensors of one rank, x different on each.
class Tensors {
 public:
  Tensors(int rank, uint64_t tokens, uint64_t hidden, bool norm)
      : tokens_(tokens), hidden_(hidden), norm_(norm), host_x_(tokens * hidden) {
    for (size_t i = 0; i < host_x_.size(); ++i) host_x_[i] = numeric::Bfloat16::from_float(value(rank, i));
    std::vector<uint16_t> gamma(hidden, 0x3F80);
    x_ = allocate(bytes());
    h_ = allocate(bytes());
    out_ = allocate(bytes());
    gamma_ = allocate(hidden * 2);
    GPU(cudaMemcpy(x_, host_x_.data(), bytes(), cudaMemcpyHostToDevice));
    GPU(cudaMemcpy(gamma_, gamma.data(), hidden * 2, cudaMemcpyHostToDevice));
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() {
    for (void* memory : {x_, h_, out_, gamma_}) cudaFree(memory);
  }

  size_t bytes() const { return tokens_ * hidden_ * 2; }

  pt_cuda_fusion_arguments arguments(int algorithm, int codec = PT_CODEC_NONE) const {
    pt_cuda_fusion_arguments a = {};
    a.struct_bytes = sizeof(a);
    a.dtype = PT_BFLOAT16;
    a.reduction = PT_MEAN;
    a.algorithm = algorithm;
    a.tokens = tokens_;
    a.hidden = hidden_;
    a.x = x_;
    a.h = h_;
    a.gamma = norm_ ? gamma_ : nullptr;
    a.norm_out = norm_ ? out_ : nullptr;
    a.num_gammas = norm_ ? 1 : 0;
    a.gamma_dtype = PT_BFLOAT16;
    a.eps = 1e-5f;
    a.codec = codec;
    return a;
  }

  std::vector<uint16_t> h() const { return fetch(h_); }
  std::vector<uint16_t> normed() const { return fetch(out_); }
  void forget() const {
    GPU(cudaMemset(h_, 0xAB, bytes()));
    GPU(cudaMemset(out_, 0xAB, bytes()));
  }

  // What every rank must have in h: the contract's arithmetic, on the host, with the host's own codecs.
  static std::vector<uint16_t> expected(const std::vector<const Tensors*>& ranks, int algorithm, int codec) {
    std::vector<float> sums = ranks[0]->received(codec);
    for (size_t rank = 1; rank < ranks.size(); ++rank) {
      const std::vector<float> values = ranks[rank]->received(codec);
      for (size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
    }
    for (float& sum : sums) sum *= 1.0f / static_cast<float>(ranks.size());
    if (algorithm == PT_FUSION_TWO_SHOT) sums = passed_through(codec, sums, ranks[0]->hidden_);
    std::vector<uint16_t> result(sums.size());
    for (size_t i = 0; i < result.size(); ++i) result[i] = numeric::Bfloat16::from_float(sums[i]);
    return result;
  }
  // Of the ranks' |x|.
  static std::vector<float> mean_sizes(const std::vector<const Tensors*>& ranks) {
    std::vector<float> sizes(ranks[0]->host_x_.size());
    for (const Tensors* rank : ranks) {
      for (size_t i = 0; i < sizes.size(); ++i) {
        sizes[i] += std::abs(numeric::Bfloat16::to_float(rank->host_x_[i])) / static_cast<float>(ranks.size());
      }
    }
    return sizes;
  }

 private:
  // x as the other ranks read it.
  std::vector<float> received(int codec) const {
    std::vector<float> values(host_x_.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = numeric::Bfloat16::to_float(host_x_[i]);
    return passed_through(codec, values, hidden_);
  }
  // Of both signs, of sizes that differ between groups, and never zero: the sign of a zero is not part of the contract.
  static float value(int rank, size_t i) {
    const auto mixed = static_cast<uint32_t>(i * 2654435761u + static_cast<size_t>(rank) * 40503u) >> 8;
    const float size = (0.37f + static_cast<float>(mixed % 1021) * 0.0113f) * static_cast<float>(1u << (i / 32 % 7));
    return mixed / 1021 % 2 == 0 ? size : -size;
  }
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    GPU(cudaMalloc(&memory, bytes));
    return memory;
  }
  std::vector<uint16_t> fetch(const void* from) const {
    std::vector<uint16_t> values(tokens_ * hidden_);
    GPU(cudaMemcpy(values.data(), from, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

  uint64_t tokens_;
  uint64_t hidden_;
  bool norm_;
  std::vector<uint16_t> host_x_;
  void* x_;
  void* h_;
  void* out_;
  void* gamma_;
};

struct Report {
  std::string json;  // lines of one JSON array
  int failures = 0;

  void add(const std::string& line, bool good = true) {
    std::fprintf(stderr, "%s\n", line.c_str());
    json += (json.empty() ? "  " : ",\n  ") + line;
    if (!good) ++failures;
  }
};

constexpr const char* kCodecNames[] = {"none", "int8", "fp8", "int4", "mxfp4"};

// h equal to the reference and the norms equal to each other, on all ranks; the hash of both.
bool same_everywhere(const std::vector<const Tensors*>& ranks, bool norm, int algorithm, int codec, uint64_t* hash);

// One cooperative kernel holds all ranks: nothing but the protocol can go wrong.
void check_cooperative(int size, int calls, Report& report);
// One stream per rank, through the C ABI: eager calls, graph replays, both interleaved.
void check_streams(int size, int replays, bool nccl, Report& report);
void measure(int size, Report& report);
// Where there are several GPUs with multicast memory; a note otherwise.
void check_nvls(int calls, Report& report);

}  // namespace pt::gpu_check
