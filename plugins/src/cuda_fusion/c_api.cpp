// SPDX-License-Identifier: Apache-2.0
// The C ABI: translates exceptions, keeps the registry of names. Nothing else.
#include <map>
#include <mutex>
#include <string>

#include "cuda_fusion/endpoint.h"

using pt::guarded;
using pt::cuda_fusion::Endpoint;

struct pt_cuda_fusion {
  std::unique_ptr<Endpoint> impl;
};

namespace {

Endpoint& checked(pt_cuda_fusion* channel) {
  PT_FUSION_REQUIRE(channel != nullptr, "the channel is null: it is closed");
  return *channel->impl;
}

const pt_cuda_fusion_arguments& checked(const pt_cuda_fusion_arguments* arguments) {
  PT_FUSION_REQUIRE(arguments != nullptr, "fuse: the arguments are null");
  return *arguments;
}

struct Registry {
  std::mutex mutex;
  std::map<std::string, pt_cuda_fusion*> channels;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

const char* pt_cuda_fusion_last_error(void) noexcept { return pt::last_error(); }

int pt_cuda_fusion_abi_version(void) noexcept { return PT_CUDA_FUSION_ABI_VERSION; }

int pt_cuda_fusion_has_cuda(void) noexcept {
#if defined(PT_HAVE_CUDA)
  return 1;
#else
  return 0;
#endif
}

int pt_cuda_fusion_open(const pt_cuda_fusion_config* config, pt_cuda_fusion_all_gather all_gather, void* context,
                        pt_cuda_fusion** channel) noexcept {
  return guarded([&] {
    PT_FUSION_REQUIRE(channel != nullptr, "open: the place for the channel is null");
    *channel = nullptr;
    PT_FUSION_REQUIRE(config != nullptr && all_gather != nullptr, "open: %s is null",
                      config == nullptr ? "the configuration" : "all_gather");
    *channel = new pt_cuda_fusion{std::make_unique<Endpoint>(*config, all_gather, context)};
  });
}

int pt_cuda_fusion_fuse(pt_cuda_fusion* channel, const pt_cuda_fusion_arguments* arguments, void* stream) noexcept {
  return guarded([&] { checked(channel).fuse(checked(arguments), stream); });
}

int pt_cuda_fusion_status(pt_cuda_fusion* channel) noexcept {
  return guarded([&] { checked(channel).check_status(); });
}

int pt_cuda_fusion_algorithm_for(pt_cuda_fusion* channel, const pt_cuda_fusion_arguments* arguments) noexcept {
  int algorithm = -1;
  guarded([&] { algorithm = static_cast<int>(checked(channel).algorithm_for(checked(arguments))); });
  return algorithm;
}

int pt_cuda_fusion_abort(pt_cuda_fusion* channel) noexcept {
  return guarded([&] { checked(channel).abort(); });
}

int pt_cuda_fusion_close(pt_cuda_fusion* channel) noexcept {
  const int status = guarded([&] { checked(channel).close(); });
  delete channel;
  return status;
}

int pt_cuda_fusion_register(const char* name, pt_cuda_fusion* channel) noexcept {
  return guarded([&] {
    PT_FUSION_REQUIRE(name != nullptr && *name != '\0', "register: the name is empty");
    const std::lock_guard lock(registry().mutex);
    if (channel == nullptr) {
      registry().channels.erase(name);
      return;
    }
    const bool fresh = registry().channels.emplace(name, channel).second;
    PT_FUSION_REQUIRE(fresh, "register: there is a channel '%s' already in this process", name);
  });
}

pt_cuda_fusion* pt_cuda_fusion_find(const char* name) noexcept {
  pt_cuda_fusion* found = nullptr;
  guarded([&] {
    const std::lock_guard lock(registry().mutex);
    const auto entry = registry().channels.find(name == nullptr ? "" : name);
    if (entry != registry().channels.end()) found = entry->second;
  });
  return found;
}

int pt_cuda_fusion_size(const pt_cuda_fusion* channel) noexcept {
  return channel == nullptr ? 0 : channel->impl->size();
}
