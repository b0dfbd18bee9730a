// SPDX-License-Identifier: Apache-2.0
// The C ABI: checks arguments, translates exceptions. Nothing else.
#include "linear/error.h"
#include "linear/linear.h"
#include "pt/linear.h"

using pt::guarded;
using pt::linear::Product;

namespace {

constexpr int kMaxThreads = 256;
constexpr size_t kMaxExtent = size_t{1} << 31;

bool is_dtype(int dtype) { return dtype >= PT_LINEAR_X_FLOAT32 && dtype <= PT_LINEAR_X_FLOAT16; }

void check_dtype(const char* where, int dtype) {
  PT_LINEAR_REQUIRE(is_dtype(dtype), "%s: dtype is %d, expected 0 (float32), 1 (bfloat16), 2 (float16)", where, dtype);
}

void check_weight(const char* where, const pt_linear_weight* weight) {
  PT_LINEAR_REQUIRE(weight != nullptr, "%s: the weight is null", where);
  const pt_linear_weight& w = *weight;
  PT_LINEAR_REQUIRE(w.kind >= PT_LINEAR_FLOAT32 && w.kind <= PT_LINEAR_INT4, "%s: kind is %d, expected 0 to 4", where,
                    w.kind);
  PT_LINEAR_REQUIRE(w.out >= 1 && w.out <= kMaxExtent, "%s: out is %zu, expected 1 to 2^31", where, w.out);
  PT_LINEAR_REQUIRE(w.in >= 32 && w.in % 32 == 0 && w.in <= kMaxExtent,
                    "%s: in is %zu, expected a multiple of 32 up to 2^31", where, w.in);
  PT_LINEAR_REQUIRE(w.weight != nullptr, "%s: the weights are null", where);
  const bool needs_scale = w.kind >= PT_LINEAR_INT8, needs_zero = w.kind == PT_LINEAR_INT4;
  PT_LINEAR_REQUIRE((w.scale != nullptr) == needs_scale, "%s: scale is %s for kind %d", where,
                    needs_scale ? "null" : "given", w.kind);
  PT_LINEAR_REQUIRE((w.zero != nullptr) == needs_zero, "%s: zero is %s for kind %d", where,
                    needs_zero ? "null" : "given", w.kind);
  if (needs_scale) check_dtype(where, w.scale_dtype);
  const bool good_group = needs_zero ? w.group_size == 32 || w.group_size == 128 : w.group_size == 0;
  PT_LINEAR_REQUIRE(good_group, "%s: group_size is %zu, expected %s", where, w.group_size,
                    needs_zero ? "32 or 128" : "0 (the kind has no groups)");
  PT_LINEAR_REQUIRE(!needs_zero || w.in % w.group_size == 0, "%s: in is %zu, expected a multiple of the group size %zu",
                    where, w.in, w.group_size);
}

int run(const char* where, const Product& product, int threads) noexcept {
  return guarded([&] {
    check_weight(where, product.weight);
    check_dtype(where, product.dtype);
    PT_LINEAR_REQUIRE(threads >= 1 && threads <= kMaxThreads, "%s: threads is %d, expected 1 to %d", where, threads,
                      kMaxThreads);
    PT_LINEAR_REQUIRE(product.rows <= kMaxExtent, "%s: rows is %zu, expected up to 2^31", where, product.rows);
    if (product.rows == 0) return;
    PT_LINEAR_REQUIRE(product.x != nullptr && product.y != nullptr, "%s: x or y is null", where);
    pt::linear::run_product(pt::linear::select_kernels(), product, threads);
  });
}

}  // namespace

const char* pt_linear_last_error(void) noexcept { return pt::last_error(); }

int pt_linear_abi_version(void) noexcept { return PT_LINEAR_ABI_VERSION; }

const char* pt_linear_isa(void) noexcept {
  const char* name = nullptr;
  guarded([&] { name = pt::linear::select_kernels().name; });
  return name;
}

int pt_linear_forward(const pt_linear_weight* weight, const void* x, const void* bias, void* y, size_t rows, int dtype,
                      int threads) noexcept {
  return run("forward", Product{weight, nullptr, x, bias, y, rows, dtype}, threads);
}

int pt_linear_swiglu(const pt_linear_weight* gate, const pt_linear_weight* up, const void* x, void* y, size_t rows,
                     int dtype, int threads) noexcept {
  const int status = guarded([&] {
    check_weight("swiglu: gate", gate);
    check_weight("swiglu: up", up);
    PT_LINEAR_REQUIRE(gate->kind == up->kind && gate->group_size == up->group_size,
                      "swiglu: gate has kind %d in groups of %zu, up kind %d in groups of %zu; expected the same",
                      gate->kind, gate->group_size, up->kind, up->group_size);
    PT_LINEAR_REQUIRE(gate->out == up->out && gate->in == up->in,
                      "swiglu: gate is [%zu, %zu], up is [%zu, %zu]; expected the same", gate->out, gate->in, up->out,
                      up->in);
  });
  return status != PT_LINEAR_OK ? status : run("swiglu", Product{gate, up, x, nullptr, y, rows, dtype}, threads);
}

int pt_linear_dequantize(const pt_linear_weight* weight, size_t first, size_t last, int dtype, void* out) noexcept {
  return guarded([&] {
    check_weight("dequantize", weight);
    check_dtype("dequantize", dtype);
    PT_LINEAR_REQUIRE(first <= last && last <= weight->out, "dequantize: outputs %zu to %zu of %zu", first, last,
                      weight->out);
    PT_LINEAR_REQUIRE(out != nullptr || first == last, "dequantize: out is null");
    pt::linear::select_kernels().dequantize(weight, first, last, dtype, out);
  });
}
