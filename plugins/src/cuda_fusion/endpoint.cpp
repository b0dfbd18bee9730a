// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/endpoint.h"

#include <atomic>
#include <cmath>

namespace pt::cuda_fusion {
namespace {

constexpr uint64_t kDefaultStaging = uint64_t{16} << 20;
constexpr uint64_t kMaxStaging = uint64_t{1} << 34;
constexpr uint32_t kDefaultBlocks = 32;
constexpr double kDefaultTimeout = 10.0;

uint64_t vectors_of(uint64_t bytes) { return (bytes + sizeof(Vector) - 1) / sizeof(Vector) * sizeof(Vector); }

uint64_t chosen(const char* name, uint64_t value, uint64_t otherwise) {
  PT_FUSION_REQUIRE(value <= kMaxStaging, "open: %s is %llu, expected at most 2^34", name,
                    static_cast<unsigned long long>(value));
  return value == 0 ? otherwise : value;
}

int checked_size(const pt_cuda_fusion_config& c) {
  PT_FUSION_REQUIRE(c.size >= 1 && c.size <= kMaxRanks, "open: size is %d, expected 1 to %d", c.size, kMaxRanks);
  return c.size;
}

// Field by field: padding bytes need not agree.
bool same(const Settings::Common& a, const Settings::Common& b) {
  return a.size == b.size && a.provider == b.provider && a.num_blocks == b.num_blocks &&
         a.limits.one_shot == b.limits.one_shot && a.limits.pull == b.limits.pull &&
         a.limits.two_shot == b.limits.two_shot && a.layout.staging_bytes == b.layout.staging_bytes &&
         a.timeout_s == b.timeout_s && a.use_nccl == b.use_nccl && a.strict_order == b.strict_order &&
         a.use_nvls == b.use_nvls;
}

const char* phase_text(Algorithm algorithm, Phase phase) {
  if (algorithm == Algorithm::kOneShot) return "its message";
  if (algorithm == Algorithm::kPull) return "its staged message";
  if (phase == Phase::kSecond) return "its sums";
  return algorithm == Algorithm::kNvls ? "its staged message" : "its slices";
}

}  // namespace

Settings resolve(const pt_cuda_fusion_config& c) {
  PT_FUSION_REQUIRE(c.struct_bytes == sizeof(c), "open: struct_bytes is %u, expected %zu: header and library differ",
                    c.struct_bytes, sizeof(c));
  checked_size(c);
  PT_FUSION_REQUIRE(c.rank >= 0 && c.rank < c.size, "open: rank is %d, expected 0 to %d", c.rank, c.size - 1);
  PT_FUSION_REQUIRE(c.provider >= PT_FUSION_HOST_THREADS && c.provider <= PT_FUSION_VMM,
                    "open: provider is %d, expected 0 (host threads), 1 (same process), 2 (CUDA IPC) or 3 (VMM)",
                    c.provider);
  PT_FUSION_REQUIRE(c.num_blocks <= kMaxBlocks, "open: num_blocks is %u, expected up to %d", c.num_blocks, kMaxBlocks);
  PT_FUSION_REQUIRE(std::isfinite(c.timeout_s) && c.timeout_s < 1e6,
                    "open: timeout_s is %g, expected a number of seconds", c.timeout_s);
  PT_FUSION_REQUIRE(c.use_nvls == 0 || c.size > 1, "open: use_nvls is set, and size is 1, expected at least 2");
  const Limits defaults = Limits::defaults(c.size);
  Settings settings = {};
  settings.rank = c.rank;
  settings.device = c.device;
  settings.common.size = c.size;
  settings.common.provider = c.provider;
  settings.common.num_blocks = c.num_blocks == 0 ? kDefaultBlocks : c.num_blocks;
  settings.common.limits = {.one_shot = vectors_of(chosen("one_shot_bytes", c.one_shot_bytes, defaults.one_shot)),
                            .pull = chosen("pull_bytes", c.pull_bytes, defaults.pull),
                            .two_shot = chosen("two_shot_bytes", c.two_shot_bytes, defaults.two_shot)};
  settings.common.layout = {.size = static_cast<uint32_t>(c.size),
                            .one_shot_bytes = settings.common.limits.one_shot,
                            .staging_bytes = vectors_of(chosen("staging_bytes", c.staging_bytes, kDefaultStaging))};
  settings.common.timeout_s = c.timeout_s == 0 ? kDefaultTimeout : c.timeout_s < 0 ? 0 : c.timeout_s;
  settings.common.use_nccl = c.use_nccl != 0;
  settings.common.strict_order = c.strict_order != 0;
  settings.common.use_nvls = c.use_nvls != 0;
  return settings;
}

Channel make_channel(const Settings& settings, const PeerMemory& memory, Control* control, Record* record) {
  Channel channel = {};
  for (int rank = 0; rank < settings.common.size; ++rank) channel.workspaces[rank] = memory.of(rank);
  channel.control = control;
  channel.record = record;
  channel.layout = settings.common.layout;
  channel.rank = static_cast<uint32_t>(settings.rank);
  channel.size = static_cast<uint32_t>(settings.common.size);
  channel.timeout_ns = static_cast<uint64_t>(settings.common.timeout_s * 1e9);
  channel.strict = settings.common.strict_order;
  return channel;
}

Endpoint::Endpoint(const pt_cuda_fusion_config& config, pt_cuda_fusion_all_gather all_gather, void* context)
    : settings_{}, exchange_(all_gather, context, checked_size(config)) {
  exchange_.together([&] { settings_ = resolve(config); });
  const std::vector<Settings::Common> all = exchange_.all_gather(settings_.common);
  exchange_.together([&] {
    for (size_t rank = 0; rank < all.size(); ++rank) {
      if (same(all[rank], settings_.common)) continue;
      throw Error(PT_MISMATCH, format_text("cuda_fusion: open: ranks 0 and %zu were given different configurations, "
                                           "expected all but rank and device to agree",
                                           rank));
    }
  });
  backend_ = config.provider == PT_FUSION_HOST_THREADS ? make_host_backend(settings_, exchange_)
                                                       : make_cuda_backend(settings_, exchange_);
  exchange_.barrier();  // nobody waits in a kernel for a rank that is still opening
}

Plan Endpoint::plan(const pt_cuda_fusion_arguments& arguments) const {
  return make_plan(arguments, settings_.common.layout, settings_.common.limits, backend_->has_nccl(),
                   settings_.common.use_nvls);
}

Algorithm Endpoint::algorithm_for(const pt_cuda_fusion_arguments& arguments) const { return plan(arguments).algorithm; }

void Endpoint::fuse(const pt_cuda_fusion_arguments& arguments, void* stream) {
  check_status();
  Plan planned = plan(arguments);
  if (planned.call.rows == 0) return;
  backend_->launch(planned, arguments.dtype, stream);
}

void Endpoint::check_status() const {
  const Record& record = backend_->record();
  if (std::atomic_ref<uint32_t>(const_cast<uint32_t&>(record.ready)).load(std::memory_order_acquire) == 0) {
    if (std::atomic_ref<uint32_t>(const_cast<uint32_t&>(record.abort_request)).load() == 0) return;
    throw Error(PT_ABORTED, format_text("cuda_fusion: rank %d aborted the channel", settings_.rank));
  }
  switch (record.failure) {
    case Failure::kTimeout:
      throw Error(PT_TIMEOUT,
                  format_text("cuda_fusion: rank %u waited %.1f s for rank %u in %s, call %u: %s did not "
                              "arrive",
                              record.rank, settings_.common.timeout_s, record.peer, algorithm_name(record.algorithm),
                              record.epoch - kFirstEpoch, phase_text(record.algorithm, record.phase)));
    case Failure::kAborted:
      throw Error(PT_ABORTED,
                  format_text("cuda_fusion: rank %u ended the channel while rank %u waited in %s, call %u", record.peer,
                              record.rank, algorithm_name(record.algorithm), record.epoch - kFirstEpoch));
    case Failure::kNotConnected:
      throw Error(PT_INTERNAL, format_text("cuda_fusion: the workspace of rank %u holds no channel", record.rank));
    case Failure::kNone:
      break;
  }
  throw Error(PT_INTERNAL, "cuda_fusion: a kernel recorded no reason");
}

void Endpoint::abort() { backend_->abort(); }

void Endpoint::close() {
  exchange_.together([&] { backend_->unmap_peers(); });
}

}  // namespace pt::cuda_fusion
