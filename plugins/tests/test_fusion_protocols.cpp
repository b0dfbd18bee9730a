// SPDX-License-Identifier: Apache-2.0
// The protocols of CUDA track fusion on threads, with random delays. Run it under ThreadSanitizer as well.
#include <cmath>

#include "fusion_world.h"

using namespace pt;
using namespace pt::testing;

namespace {

constexpr size_t kMaxElements = 6000;

struct Tensors {
  std::vector<uint8_t> x, residual, h, norm;
  std::vector<float> gamma;
};

struct Case {
  Algorithm algorithm;
  uint64_t tokens;
  uint64_t hidden;
  uint32_t num_gammas;
  bool has_residual;
};

// The same on all ranks: from the number of the call.
Case draw(unsigned call) {
  std::mt19937 random(call * 7919 + 1);
  const uint64_t hiddens[] = {8, 40, 64, 200, 33};  // 33: rows that end inside a vector
  Case drawn = {};
  constexpr Algorithm kAll[] = {Algorithm::kOneShot, Algorithm::kPull, Algorithm::kTwoShot, Algorithm::kNvls};
  drawn.algorithm = kAll[random() % std::size(kAll)];
  drawn.hidden = hiddens[random() % std::size(hiddens)];
  drawn.tokens = 1 + random() % (drawn.algorithm == Algorithm::kOneShot ? 6 : 24);
  drawn.num_gammas = static_cast<uint32_t>(random() % 3);
  drawn.has_residual = drawn.algorithm != Algorithm::kTwoShot && random() % 4 == 0;
  return drawn;
}

template <typename Type>
void put(std::vector<uint8_t>& to, size_t i, float value) {
  const typename Type::Storage bits = Type::from_float(value);
  std::memcpy(to.data() + i * sizeof(bits), &bits, sizeof(bits));
}

template <typename Type>
float get(const std::vector<uint8_t>& from, size_t i) {
  typename Type::Storage bits;
  std::memcpy(&bits, from.data() + i * sizeof(bits), sizeof(bits));
  return Type::to_float(bits);
}

template <typename Type>
Plan prepare(Tensors& t, const Case& drawn, int dtype, int rank, unsigned call, const Layout& layout) {
  const size_t count = drawn.tokens * drawn.hidden;
  for (size_t i = 0; i < count; ++i) put<Type>(t.x, i, fusion_input(rank, call, i));
  for (size_t i = 0; i < count; ++i) put<Type>(t.residual, i, fusion_input(99, call, i));
  for (size_t i = 0; i < 2 * drawn.hidden; ++i) t.gamma[i] = 1.0f + static_cast<float>(i % 5) * 0.25f;
  pt_cuda_fusion_arguments a = {};
  a.struct_bytes = sizeof(a);
  a.dtype = dtype;
  a.reduction = call % 2 == 0 ? PT_MEAN : PT_SUM;
  a.algorithm = static_cast<int>(drawn.algorithm);
  a.tokens = drawn.tokens;
  a.hidden = drawn.hidden;
  a.x = t.x.data();
  a.residual = drawn.has_residual ? t.residual.data() : nullptr;
  a.h = t.h.data();
  a.gamma = drawn.num_gammas == 0 ? nullptr : t.gamma.data();
  a.norm_out = t.norm.data();
  a.num_gammas = drawn.num_gammas;
  a.gamma_dtype = PT_FLOAT32;
  a.eps = 1e-5f;
  return make_plan(a, layout, Limits::defaults(static_cast<int>(layout.size)), false, true);
}

// Sums of these inputs are exact in float32: any order would do, and only the sign of a zero is not compared.
template <typename Type>
void check_results(const Tensors& t, const Case& drawn, int size, unsigned call) {
  for (uint64_t token = 0; token < drawn.tokens; ++token) {
    double squares = 0;
    for (uint64_t column = 0; column < drawn.hidden; ++column) {
      const size_t i = token * drawn.hidden + column;
      float sum = 0;
      for (int rank = 0; rank < size; ++rank) sum += Type::to_float(Type::from_float(fusion_input(rank, call, i)));
      if (call % 2 == 0) sum *= 1.0f / static_cast<float>(size);
      if (drawn.has_residual) sum += Type::to_float(Type::from_float(fusion_input(99, call, i)));
      const float expected = Type::to_float(Type::from_float(sum));
      const float h = get<Type>(t.h, i);
      if (h != expected) {
        std::fprintf(stderr, "call %u, token %llu, column %llu: h is %g, expected %g\n", call,
                     static_cast<unsigned long long>(token), static_cast<unsigned long long>(column),
                     static_cast<double>(h), static_cast<double>(expected));
        std::exit(1);
      }
      squares += static_cast<double>(h) * h;
    }
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(drawn.hidden) + 1e-5f);
    for (uint32_t g = 0; g < drawn.num_gammas; ++g) {
      for (uint64_t column = 0; column < drawn.hidden; ++column) {
        const size_t i = token * drawn.hidden + column;
        const double expected = static_cast<double>(get<Type>(t.h, i)) * inverse * t.gamma[g * drawn.hidden + column];
        const double step = sizeof(typename Type::Storage) == 4 ? 1e-6 : 1.0 / 128;
        const double found = get<Type>(t.norm, g * drawn.tokens * drawn.hidden + i);
        CHECK(std::abs(found - expected) <= std::abs(expected) * step);
      }
    }
  }
}

template <typename Type, int kRanks>
void all_algorithms_agree(int size, uint32_t num_blocks, uint32_t threads, int dtype, unsigned calls, bool strict) {
  FusionWorld world(size, num_blocks, threads, {static_cast<uint32_t>(size), 8192, 4608});
  std::vector<Tensors> tensors(static_cast<size_t>(size));
  std::vector<Case> cases(static_cast<size_t>(size));
  std::vector<Plan> plans(static_cast<size_t>(size));
  std::vector<std::vector<uint8_t>> first_norm(calls);
  for (Tensors& t : tensors) {
    t.x.resize(kMaxElements * 4);
    t.residual.resize(kMaxElements * 4);
    t.h.resize(kMaxElements * 4);
    t.norm.resize(kMaxElements * 8);
    t.gamma.resize(512);
  }
  for (int rank = 0; rank < size; ++rank) world.channel(rank).strict = strict;
  world.run([&](int rank, HostTeam& team, const auto& kernel_boundary) {
    const auto r = static_cast<size_t>(rank);
    for (unsigned call = 0; call < calls; ++call) {
      if (kernel_boundary()) {
        cases[r] = draw(call);
        plans[r] = prepare<Type>(tensors[r], cases[r], dtype, rank, call, world.layout());
      }
      kernel_boundary();
      run_protocol<DelayedMemory, Plain<Type>, kRanks>(plans[r].algorithm, world.channel(rank), plans[r].call, team);
      if (kernel_boundary()) check_results<Type>(tensors[r], cases[r], size, call);
    }
  });
  for (int rank = 0; rank < size; ++rank) {
    CHECK(world.record(rank).ready == 0);
    const size_t bytes = cases[0].tokens * cases[0].hidden * dtype_bytes(dtype) * cases[0].num_gammas;
    CHECK(std::memcmp(tensors[0].norm.data(), tensors[static_cast<size_t>(rank)].norm.data(), bytes) == 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned calls = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 400;
  using numeric::Bfloat16, numeric::Float16, numeric::Float32;
  all_algorithms_agree<Bfloat16, 2>(2, 2, 2, PT_BFLOAT16, calls, false);
  all_algorithms_agree<Float16, 0>(3, 1, 2, PT_FLOAT16, calls, true);
  all_algorithms_agree<Float32, 4>(4, 2, 1, PT_FLOAT32, calls, false);
  all_algorithms_agree<Bfloat16, 8>(8, 2, 1, PT_BFLOAT16, calls, false);
}
