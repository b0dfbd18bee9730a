// SPDX-License-Identifier: Apache-2.0
// Life cycle of a group: create, attach, close, and what happens after a failure.
#include "track_fusion/group.h"

#include <unistd.h>

#include <cmath>
#include <cstring>

#include "track_fusion/futex.h"

namespace pt::track_fusion {
namespace {

// A waiting rank spins this many pauses (about 20 us where a pause takes 50 ns) before it yields: whenever the system
// puts two ranks on one core, all of it is lost in every wait. With fewer cores than ranks that is always so.
constexpr int kSpinLimit = 400;
constexpr int kSpinLimitOversubscribed = 64;
// Two seconds for a peer that has begun to say why it gives up.
constexpr int kReasonPollUs = 100;
constexpr int kReasonPolls = 20000;

void check_size(const char* where, int size) {
  PT_REQUIRE(size >= 1 && size <= PT_TRACK_FUSION_MAX_RANKS, "%s: size is %d, expected 1 to %d", where, size,
             PT_TRACK_FUSION_MAX_RANKS);
}

void check_timeout(const char* where, double timeout_s) {
  PT_REQUIRE(std::isfinite(timeout_s) && timeout_s >= 0, "%s: timeout_s is %g, expected 0 (no limit) or more", where,
             timeout_s);
}

void check_header(const Header& header, const SharedSegment& segment, int rank, int size) {
  const char* name = segment.name().c_str();
  const auto magic = static_cast<unsigned long long>(header.magic.load(std::memory_order_acquire));
  PT_REQUIRE(magic == kMagic, "attach: '%s' is not a track fusion segment (magic %#llx, expected %#llx)", name, magic,
             static_cast<unsigned long long>(kMagic));
  PT_REQUIRE(header.layout_version == kLayoutVersion,
             "attach: '%s' has layout version %u, expected %u: ranks run different versions of the library", name,
             header.layout_version, kLayoutVersion);
  PT_REQUIRE(header.size == static_cast<uint32_t>(size), "attach: '%s' is a group of %u ranks, expected %d", name,
             header.size, size);
  PT_REQUIRE(rank >= 1 && rank < size, "attach: rank is %d, expected 1 to %d (rank 0 creates the group)", rank,
             size - 1);
  PT_REQUIRE(header.capacity_bytes >= kMinCapacity && header.capacity_bytes <= kMaxCapacity,
             "attach: '%s' is damaged (capacity of %llu bytes)", name,
             static_cast<unsigned long long>(header.capacity_bytes));
  const size_t expected = Layout(size, header.capacity_bytes).total_bytes();
  PT_REQUIRE(header.total_bytes == expected && segment.bytes() == expected,
             "attach: '%s' has %zu bytes and says %llu, expected %zu", name, segment.bytes(),
             static_cast<unsigned long long>(header.total_bytes), expected);
  PT_REQUIRE(header.pid_namespace == pid_namespace(),
             "attach: '%s' was created in another PID namespace; ranks must share one, or a dead peer goes unnoticed",
             name);
}

}  // namespace

std::unique_ptr<Group> Group::create(int size, size_t capacity_bytes, double timeout_s) {
  check_size("create", size);
  check_timeout("create", timeout_s);
  PT_REQUIRE(capacity_bytes >= 1 && capacity_bytes <= kMaxCapacity, "create: capacity_bytes is %zu, expected 1 to %zu",
             capacity_bytes, kMaxCapacity);
  const Layout layout(size, Layout::round_capacity(capacity_bytes));
  auto segment = SharedSegment::create(layout.total_bytes());
  auto* header = new (segment->data()) Header{};
  header->layout_version = kLayoutVersion;
  header->size = static_cast<uint32_t>(size);
  header->capacity_bytes = Layout::round_capacity(capacity_bytes);
  header->total_bytes = layout.total_bytes();
  header->pid_namespace = pid_namespace();
  for (int rank = 0; rank < size; ++rank) {
    auto* flag = new (segment->data() + layout.flag(rank)) RankFlag{};
    flag->epoch.store(kFirstEpoch, std::memory_order_relaxed);
    new (segment->data() + layout.info(rank)) RankInfo{};
  }
  std::unique_ptr<Group> group(new Group(segment, 0, size, timeout_s));
  header->magic.store(kMagic, std::memory_order_release);
  return group;
}

std::unique_ptr<Group> Group::attach(const std::string& name, int rank, int size, double timeout_s) {
  return attach(SharedSegment::attach(name, sizeof(Header)), rank, size, timeout_s);
}

std::unique_ptr<Group> Group::attach(std::shared_ptr<SharedSegment> segment, int rank, int size, double timeout_s) {
  check_size("attach", size);
  check_timeout("attach", timeout_s);
  check_header(*reinterpret_cast<const Header*>(segment->data()), *segment, rank, size);
  return std::unique_ptr<Group>(new Group(std::move(segment), rank, size, timeout_s));
}

Group::Group(std::shared_ptr<SharedSegment> segment, int rank, int size, double timeout_s)
    : segment_(std::move(segment)),
      rank_(rank),
      size_(size),
      timeout_s_(timeout_s),
      layout_(size, reinterpret_cast<const Header*>(segment_->data())->capacity_bytes),
      kernels_(&select_kernels()),
      capacity_(header().capacity_bytes),
      spin_limit_(::sysconf(_SC_NPROCESSORS_ONLN) < size ? kSpinLimitOversubscribed : kSpinLimit) {
  seen_.fill(kFirstEpoch);
  verified_.fill(kFirstEpoch);
  RankInfo& own = info(rank_);
  AttachState expected = AttachState::kFree;
  PT_REQUIRE(own.state.compare_exchange_strong(expected, AttachState::kClaimed),
             "attach: rank %d of '%s' is already taken by pid %d", rank_, name().c_str(), pid(rank_));
  const ProcessIdentity self = ProcessIdentity::self();
  own.pid.store(self.pid, std::memory_order_relaxed);
  own.start_time = self.start_time;
  own.state.store(AttachState::kAttached, std::memory_order_release);
  // From here on nobody needs the name: even SIGKILL of every rank leaves nothing in /dev/shm.
  if (header().num_attached.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    segment_->unlink();
  }
}

Group::~Group() = default;

void Group::unlink(double timeout_s) {
  const BusyGuard guard(busy_);
  check_healthy();
  const double limit_s = timeout_s < 0 ? timeout_s_ : timeout_s;
  const auto start = std::chrono::steady_clock::now();
  const auto all = static_cast<uint32_t>(size_);
  while (header().num_attached.load(std::memory_order_acquire) < all) {
    check_healthy();
    const double waited_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (limit_s > 0 && waited_s >= limit_s) {
      const uint32_t attached = header().num_attached.load(std::memory_order_acquire);
      fail(PT_TIMEOUT, "rank %d waited %.1f s in unlink: %u of %d ranks have attached to '%s'", rank_, waited_s,
           attached, size_, name().c_str());
    }
    ::usleep(1000);
  }
  segment_->unlink();
}

void Group::close() {
  const BusyGuard guard(busy_);
  info(rank_).state.store(AttachState::kClosed, std::memory_order_release);
  futex_wake_all(flag(rank_).epoch);
}

void Group::abort(const char* reason) noexcept { publish_abort(reason == nullptr ? "no reason given" : reason); }

void Group::check_healthy() const {
  if (failure_) {
    throw Error(
        failure_->status(),
        format_text("track_fusion: the group failed earlier and cannot be used any more: %s", failure_->what()));
  }
  if (header().abort_state.load(std::memory_order_acquire) != AbortState::kNone) throw aborted_by_peer();
}

void Group::poison(const Error& error) noexcept {
  try {
    failure_ = error;
  } catch (...) {  // out of memory: the shared abort below still stops every later call
  }
  publish_abort(error.what());
}

void Group::publish_abort(const char* reason) noexcept {
  AbortState expected = AbortState::kNone;
  if (header().abort_state.compare_exchange_strong(expected, AbortState::kWriting)) {
    header().abort_rank = rank_;
    std::strncpy(header().abort_reason, reason, sizeof(header().abort_reason) - 1);
    header().abort_state.store(AbortState::kReady, std::memory_order_release);
  }
  for (int peer = 0; peer < size_; ++peer) futex_wake_all(flag(peer).epoch);
}

Error Group::aborted_by_peer() const {
  // The writer needs a moment between claiming the reason and completing it, a long one where it has lost its core; it
  // may also have died in between.
  for (int attempt = 0; attempt < kReasonPolls; ++attempt) {
    if (header().abort_state.load(std::memory_order_acquire) == AbortState::kReady) {
      const std::string reason(header().abort_reason, ::strnlen(header().abort_reason, sizeof(Header::abort_reason)));
      return Error(PT_ABORTED,
                   format_text("track_fusion: rank %d stopped in %s (call %llu): rank %d aborted the group: %s", rank_,
                               operation_name(record_.operation), static_cast<unsigned long long>(call_),
                               header().abort_rank, reason.c_str()));
    }
    ::usleep(kReasonPollUs);
  }
  return Error(PT_ABORTED,
               format_text("track_fusion: rank %d stopped in %s (call %llu): a peer aborted the group and "
                           "died before it could say why",
                           rank_, operation_name(record_.operation), static_cast<unsigned long long>(call_)));
}

}  // namespace pt::track_fusion
