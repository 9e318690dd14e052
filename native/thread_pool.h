// One pool of threads for all kernels of the process.
#ifndef HEADRACE_NATIVE_THREAD_POOL_H_
#define HEADRACE_NATIVE_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

// Runs one task at a time on the caller and num_threads - 1 workers.
//
// A worker that has nothing to do spins for some tens of microseconds, since the next op of a forward pass usually
// follows sooner than a sleeping thread wakes, and then sleeps until it is called. Nothing is pinned.
//
// Invariants: every worker finishes task e before task e + 1 is published; pending_ counts workers still in task e.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  // Joins the workers.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(thread) once for each thread in [0, num_threads) and returns when all have. Callers on other threads
  // wait for their turn. Throws std::logic_error inside a task. Tasks must not throw.
  template <class Task>
  void Run(const Task& task) {
    RunErased([](const void* context, int thread) { (*static_cast<const Task*>(context))(thread); }, &task);
  }

 private:
  using Function = void (*)(const void* context, int thread);

  void RunErased(Function function, const void* context);
  void Work(int thread);
  void Stop();
  // The next epoch, awake or after a sleep.
  uint32_t AwaitEpochAfter(uint32_t seen);

  std::vector<std::thread> workers_;
  std::mutex caller_mutex_;
  Function function_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> pending_{0};
  std::atomic<bool> is_stopping_{false};
  std::atomic<int> num_sleeping_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// Where all threads of a task wait for each other, once.
class Barrier {
 public:
  void Wait(int num_threads);

 private:
  std::atomic<int> num_arrived_{0};
};

// The process's pool, made on first use with the size last set (1 until then).
//
// After fork() the child has no workers: it starts with a pool of its own, of the same size, on first use. A fork while
// another thread is inside a kernel is as safe, because nothing of the parent's pool is touched in the child.
std::shared_ptr<ThreadPool> Pool();

// task(part, num_parts) once for each part: on the threads of the pool, or, without one, on the calling thread alone.
template <class Task>
void RunParts(ThreadPool* pool, const Task& task) {
  if (pool == nullptr) return task(0, 1);
  const int num_threads = pool->num_threads();
  pool->Run([&](int thread) { task(thread, num_threads); });
}
template <class Task>
void RunParts(bool is_parallel, const Task& task) {
  RunParts((is_parallel ? Pool() : nullptr).get(), task);
}

// A kernel that runs meanwhile ends on the pool it began on. Throws std::invalid_argument if not positive.
void SetNumThreads(int num_threads);
int NumThreads();

}  // namespace headrace

#endif  // HEADRACE_NATIVE_THREAD_POOL_H_
