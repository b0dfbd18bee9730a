// SPDX-License-Identifier: Apache-2.0
// The C ABI: checks arguments, translates exceptions. Nothing else.
#include <cmath>
#include <limits>
#include <new>

#include "pt/codecs.h"
#include "pt/track_fusion.h"
#include "track_fusion/group.h"

using pt::guarded;
using pt::track_fusion::CodecArgs;
using pt::track_fusion::FuseArgs;
using pt::track_fusion::Group;

struct pt_group {
  std::unique_ptr<Group> impl;
  int size;
};

namespace {

Group& checked(pt_group* group) {
  PT_REQUIRE(group != nullptr, "the group handle is null: the group is closed");
  return *group->impl;
}

void check_dtype(const char* where, int dtype) {
  PT_REQUIRE(dtype >= PT_FLOAT32 && dtype <= PT_FLOAT16,
             "%s: dtype is %d, expected 0 (float32), 1 (bfloat16), 2 (float16)", where, dtype);
}

void check_root(const pt_group* group, const char* where, int root) {
  PT_REQUIRE(root >= 0 && root < group->size, "%s: root is %d, expected 0 to %d", where, root, group->size - 1);
}

void check_timeout(const char* where, double timeout_s) {
  PT_REQUIRE(std::isfinite(timeout_s), "%s: timeout_s is %g, expected a finite number", where, timeout_s);
}

// A product that must fit the address space together with the ranks' copies of it.
void check_extent(const char* where, size_t rows, size_t row_bytes) {
  constexpr size_t kLimit = std::numeric_limits<size_t>::max() / (8 * PT_TRACK_FUSION_MAX_RANKS);
  PT_REQUIRE(row_bytes == 0 || rows <= kLimit / row_bytes, "%s: %zu rows of %zu is too large", where, rows, row_bytes);
}

void check_buffer(const char* where, const char* name, const void* pointer, size_t bytes) {
  PT_REQUIRE(pointer != nullptr || bytes == 0, "%s: %s is null, expected %zu bytes", where, name, bytes);
}

void check_fuse(const FuseArgs& args) {
  check_dtype("fuse", args.dtype);
  PT_REQUIRE(args.reduction == PT_MEAN || args.reduction == PT_SUM,
             "fuse: reduction is %d, expected 0 (mean) or 1 (sum)", args.reduction);
  PT_REQUIRE(args.hidden > 0, "fuse: hidden is 0, expected at least 1");
  check_extent("fuse", args.tokens, args.hidden);
  const size_t bytes = args.tokens * args.hidden * pt::track_fusion::dtype_bytes(args.dtype);
  check_buffer("fuse", "x", args.x, bytes);
  check_buffer("fuse", "h", args.h, bytes);
  PT_REQUIRE((args.num_gammas == 0) == (args.gamma == nullptr), "fuse: num_gammas is %zu and gamma is %s",
             args.num_gammas, args.gamma == nullptr ? "null" : "given");
  if (args.num_gammas == 0) return;
  check_buffer("fuse", "norm_out", args.norm_out, bytes);
  PT_REQUIRE(args.gamma_dtype == args.dtype || args.gamma_dtype == PT_FLOAT32,
             "fuse: gamma is %s, expected %s or float32", pt::track_fusion::dtype_name(args.gamma_dtype),
             pt::track_fusion::dtype_name(args.dtype));
}

void check_coding(const FuseArgs& args, int codec, int delta, int algorithm) {
  PT_REQUIRE(codec >= PT_CODEC_INT8 && codec <= PT_CODEC_MXFP4,
             "fuse: codec is %d, expected 1 (int8), 2 (fp8), 3 (int4), 4 (mxfp4)", codec);
  PT_REQUIRE(algorithm >= PT_AUTO && algorithm <= PT_TWO_SHOT,
             "fuse: algorithm is %d, expected 0 (auto), 1 (one-shot), 2 (two-shot)", algorithm);
  PT_REQUIRE(!delta || ((args.residual != nullptr || args.tokens == 0) && args.reduction == PT_MEAN),
             "fuse: delta needs a residual and the mean; the residual is %s, the reduction the %s",
             args.residual == nullptr ? "null" : "given", args.reduction == PT_MEAN ? "mean" : "sum");
}

template <typename Make>
int make_group(pt_group** out, int size, Make&& make) noexcept {
  return guarded([&] {
    PT_REQUIRE(out != nullptr, "the place for the group handle is null");
    *out = nullptr;
    *out = new pt_group{make(), size};
  });
}

}  // namespace

const char* pt_last_error(void) noexcept { return pt::last_error(); }

int pt_track_fusion_abi_version(void) noexcept { return PT_TRACK_FUSION_ABI_VERSION; }

int pt_track_fusion_create(int size, size_t capacity_bytes, double timeout_s, pt_group** group) noexcept {
  return make_group(group, size, [&] { return Group::create(size, capacity_bytes, timeout_s); });
}

int pt_track_fusion_attach(const char* name, int rank, int size, double timeout_s, pt_group** group) noexcept {
  return make_group(group, size, [&] {
    PT_REQUIRE(name != nullptr, "attach: the name is null");
    return Group::attach(std::string(name), rank, size, timeout_s);
  });
}

const char* pt_track_fusion_name(const pt_group* group) noexcept {
  return group == nullptr ? "" : group->impl->name().c_str();
}

const char* pt_track_fusion_isa(const pt_group* group) noexcept { return group == nullptr ? "" : group->impl->isa(); }

int pt_track_fusion_unlink(pt_group* group, double timeout_s) noexcept {
  return guarded([&] { checked(group).unlink(timeout_s); });
}

int pt_track_fusion_fuse(pt_group* group, const void* x, const void* residual, void* h, size_t tokens, size_t hidden,
                         int dtype, int reduction, const void* gamma, size_t num_gammas, int gamma_dtype, float eps,
                         void* norm_out, double timeout_s) noexcept {
  return guarded([&] {
    Group& impl = checked(group);
    const FuseArgs args = {x,         residual, h,          tokens,      hidden, dtype,
                           reduction, gamma,    num_gammas, gamma_dtype, eps,    norm_out};
    check_fuse(args);
    check_timeout("fuse", timeout_s);
    impl.fuse(args, timeout_s);
  });
}

int pt_track_fusion_fuse_coded(pt_group* group, const void* x, const void* residual, void* h, size_t tokens,
                               size_t hidden, int dtype, int reduction, const void* gamma, size_t num_gammas,
                               int gamma_dtype, float eps, void* norm_out, int codec, int delta, int algorithm,
                               double timeout_s) noexcept {
  return guarded([&] {
    Group& impl = checked(group);
    const FuseArgs args = {x,         residual, h,          tokens,      hidden, dtype,
                           reduction, gamma,    num_gammas, gamma_dtype, eps,    norm_out};
    check_fuse(args);
    check_coding(args, codec, delta, algorithm);
    check_timeout("fuse", timeout_s);
    impl.fuse_coded(args, CodecArgs{codec, delta != 0, algorithm}, timeout_s);
  });
}

int pt_track_fusion_all_reduce(pt_group* group, const void* x, void* out, size_t count, int dtype,
                               double timeout_s) noexcept {
  return guarded([&] {
    Group& impl = checked(group);
    check_dtype("all_reduce", dtype);
    check_extent("all_reduce", 1, count);
    check_buffer("all_reduce", "x", x, count * pt::track_fusion::dtype_bytes(dtype));
    check_buffer("all_reduce", "out", out, count * pt::track_fusion::dtype_bytes(dtype));
    check_timeout("all_reduce", timeout_s);
    impl.all_reduce(x, out, count, dtype, timeout_s);
  });
}

int pt_track_fusion_broadcast(pt_group* group, void* buffer, size_t bytes, int root, double timeout_s) noexcept {
  return guarded([&] {
    Group& impl = checked(group);
    check_root(group, "broadcast", root);
    check_buffer("broadcast", "buffer", buffer, bytes);
    check_timeout("broadcast", timeout_s);
    impl.broadcast(buffer, bytes, root, timeout_s);
  });
}

int pt_track_fusion_gather(pt_group* group, const void* in, size_t rows, size_t row_bytes, void* out, int root,
                           double timeout_s) noexcept {
  return guarded([&] {
    Group& impl = checked(group);
    check_root(group, "gather", root);
    check_extent("gather", rows, row_bytes);
    check_buffer("gather", "in", in, rows * row_bytes);
    if (impl.rank() == root) check_buffer("gather", "out", out, rows * row_bytes);
    check_timeout("gather", timeout_s);
    impl.gather(in, rows, row_bytes, out, root, timeout_s);
  });
}

int pt_track_fusion_barrier(pt_group* group, double timeout_s) noexcept {
  return guarded([&] {
    check_timeout("barrier", timeout_s);
    checked(group).barrier(timeout_s);
  });
}

int pt_track_fusion_poll(pt_group* group, int peer, double timeout_s) noexcept {
  bool ready = false;
  const int status = guarded([&] {
    check_timeout("poll", timeout_s);
    ready = checked(group).poll(peer, timeout_s);
  });
  return status == PT_OK && !ready ? PT_NOT_READY : status;
}

int pt_track_fusion_abort(pt_group* group, const char* reason) noexcept {
  return guarded([&] { checked(group).abort(reason); });
}

int pt_track_fusion_close(pt_group* group) noexcept {
  return guarded([&] {
    checked(group).close();
    delete group;
  });
}
