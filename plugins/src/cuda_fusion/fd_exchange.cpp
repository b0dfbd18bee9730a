// SPDX-License-Identifier: Apache-2.0
#include "cuda_fusion/fd_exchange.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>

namespace pt::cuda_fusion {
namespace {

using Clock = std::chrono::steady_clock;

struct Address {
  sockaddr_un name;
  socklen_t bytes;
};

[[noreturn]] void fail_system(const char* what) {
  throw Error(PT_SYSTEM_ERROR, format_text("cuda_fusion: %s: %s", what, std::strerror(errno)));
}

// A random name in the abstract namespace: no file, and gone with the socket.
Address random_address() {
  uint64_t words[2];
  if (::getrandom(words, sizeof(words), 0) != static_cast<ssize_t>(sizeof(words))) fail_system("getrandom");
  const std::string text = format_text("pt-cuda-fusion-%016llx%016llx", static_cast<unsigned long long>(words[0]),
                                       static_cast<unsigned long long>(words[1]));
  Address address = {};
  address.name.sun_family = AF_UNIX;
  std::memcpy(address.name.sun_path + 1, text.data(), text.size());
  address.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

const sockaddr* generic(const Address& address) { return reinterpret_cast<const sockaddr*>(&address.name); }

void require_same_user(int socket) {
  ucred peer = {};
  socklen_t bytes = sizeof(peer);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) fail_system("SO_PEERCRED");
  if (peer.uid != ::geteuid()) {
    throw Error(PT_SYSTEM_ERROR, format_text("cuda_fusion: process %d of user %u connected, expected user %u", peer.pid,
                                             peer.uid, ::geteuid()));
  }
}

void send_fd(const Address& to, int rank, int fd) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket.valid()) fail_system("socket");
  // The listener exists since before its name was exchanged, and its queue holds everybody.
  if (::connect(socket.get(), generic(to), to.bytes) != 0) fail_system("connect to a peer's socket");
  require_same_user(socket.get());
  iovec data = {&rank, sizeof(rank)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  if (::sendmsg(socket.get(), &message, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(rank))) {
    fail_system("sending a file descriptor");
  }
}

void wait_readable(int socket, Clock::time_point deadline) {
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry = {socket, POLLIN, 0};
    const int ready = left <= 0 ? 0 : ::poll(&entry, 1, static_cast<int>(left));
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) fail_system("poll");
    if (ready == 0) {
      throw Error(PT_TIMEOUT, "cuda_fusion: open: not every rank sent its file descriptor in time");
    }
  }
}

// The sender's rank and its descriptor.
std::pair<int, UniqueFd> receive_fd(int listener, Clock::time_point deadline) {
  wait_readable(listener, deadline);
  UniqueFd socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.valid()) fail_system("accept");
  require_same_user(socket.get());
  wait_readable(socket.get(), deadline);
  int rank = -1;
  iovec data = {&rank, sizeof(rank)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (::recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof(rank))) {
    fail_system("receiving a file descriptor");
  }
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) {
    throw Error(PT_SYSTEM_ERROR, "cuda_fusion: open: a message came without its file descriptor");
  }
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
  return {rank, UniqueFd(fd)};
}

}  // namespace

std::vector<UniqueFd> exchange_fds(int rank, int size, int fd, const Exchange& exchange, double timeout_s) {
  UniqueFd listener;
  Address own = {};
  exchange.together([&] {
    listener = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!listener.valid()) fail_system("socket");
    own = random_address();
    if (::bind(listener.get(), generic(own), own.bytes) != 0) fail_system("bind");
    if (::listen(listener.get(), size) != 0) fail_system("listen");
  });
  const std::vector<Address> addresses = exchange.all_gather(own);
  const std::vector<char> senders = exchange.all_gather(static_cast<char>(fd >= 0));
  std::vector<UniqueFd> received(static_cast<size_t>(size));
  exchange.together([&] {
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(timeout_s > 0 ? timeout_s : 60.0));
    int expected = 0;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == rank) continue;
      if (fd >= 0) send_fd(addresses[static_cast<size_t>(peer)], rank, fd);
      if (senders[static_cast<size_t>(peer)] != 0) ++expected;
    }
    for (int count = 0; count < expected; ++count) {
      auto [sender, descriptor] = receive_fd(listener.get(), deadline);
      if (sender < 0 || sender >= size || sender == rank || received[static_cast<size_t>(sender)].valid()) {
        throw Error(PT_SYSTEM_ERROR, format_text("cuda_fusion: open: a descriptor came from rank %d", sender));
      }
      received[static_cast<size_t>(sender)] = std::move(descriptor);
    }
  });
  return received;
}

}  // namespace pt::cuda_fusion
