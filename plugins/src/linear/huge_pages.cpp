// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "linear/error.h"
#include "pt/linear.h"

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t whole_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

int pt_linear_huge_alloc(size_t bytes, void** memory) noexcept {
  return pt::guarded([&] {
    PT_LINEAR_REQUIRE(memory != nullptr, "huge_alloc: the place for the address is null");
    *memory = nullptr;
    PT_LINEAR_REQUIRE(bytes > 0 && bytes <= SIZE_MAX / 2, "huge_alloc: %zu bytes, expected at least 1", bytes);
    const size_t size = whole_pages(bytes);
    // One huge page more than needed, so that an aligned range lies inside; the rest goes back.
    void* const raw =
        ::mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) {
      throw pt::Error(PT_SYSTEM_ERROR,
                      pt::format_text("linear: mmap of %zu bytes failed: %s", size + kHugePage, std::strerror(errno)));
    }
    const auto begin = reinterpret_cast<uintptr_t>(raw);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (aligned > begin) ::munmap(raw, aligned - begin);
    const uintptr_t end = aligned + size;
    if (begin + size + kHugePage > end) ::munmap(reinterpret_cast<void*>(end), begin + size + kHugePage - end);
    // Only advice: without huge pages the memory is as good as any other.
    ::madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);
    *memory = reinterpret_cast<void*>(aligned);
  });
}

void pt_linear_huge_free(void* memory, size_t bytes) noexcept {
  if (memory != nullptr) ::munmap(memory, whole_pages(bytes));
}
