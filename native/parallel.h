// Work cut into one part for each thread.
#ifndef HEADRACE_NATIVE_PARALLEL_H_
#define HEADRACE_NATIVE_PARALLEL_H_

#include <memory>

#include "range.h"
#include "thread_pool.h"

namespace headrace {

// Calls task(part, num_parts) for each part: on all threads of the pool, or as one part on the caller where waking the
// others would cost more than it saves.
template <class Task>
void RunParts(bool is_parallel, const Task& task) {
  if (!is_parallel) return task(0, 1);
  const std::shared_ptr<ThreadPool> pool = Pool();
  const int num_threads = pool->num_threads();
  pool->Run([&](int thread) { task(thread, num_threads); });
}

}  // namespace headrace

#endif  // HEADRACE_NATIVE_PARALLEL_H_
