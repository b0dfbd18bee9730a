// SPDX-License-Identifier: Apache-2.0
// Runs independent items on a few threads.
#pragma once

#include <cstddef>

namespace pt::attention {

// Calls body(context, worker, item) once for every item in 0 .. count - 1, on the calling thread (worker 0) and up to
// num_threads - 1 threads of one pool per process. Which thread runs an item is open. `body` must not throw. While
// another thread of the process uses the pool, the caller does everything itself.
void parallel_for(int num_threads, size_t count, void (*body)(void* context, int worker, size_t item), void* context);

}  // namespace pt::attention
