#include "thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace headrace {
namespace {

// Longer than the gap between two ops of a layer, shorter than anyone notices on a busy machine.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kSpinsBetweenClockReads = 64;

thread_local bool is_inside_task = false;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
bool SpinUntil(const Condition& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kSpinsBetweenClockReads; ++i) {
      if (condition()) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  try {
    for (int thread = 1; thread < num_threads; ++thread) workers_.emplace_back(&ThreadPool::Work, this, thread);
  } catch (...) {
    Stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { Stop(); }

void ThreadPool::Stop() {
  {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    is_stopping_.store(true);
    epoch_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::RunErased(Function function, const void* context) {
  if (is_inside_task) throw std::logic_error("a kernel's task cannot start another one on the thread pool");
  const std::lock_guard<std::mutex> lock(caller_mutex_);
  is_inside_task = true;
  function_ = function;
  context_ = context;
  pending_.store(static_cast<int>(workers_.size()));
  epoch_.fetch_add(1);  // publishes the task
  // A worker counts itself asleep before it looks at the epoch for the last time, and both are sequentially
  // consistent: either it sees the new epoch or it is seen here.
  if (num_sleeping_.load() > 0) {
    {
      const std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
    }
    wake_.notify_all();
  }
  function(context, 0);
  const auto is_done = [this] { return pending_.load(std::memory_order_acquire) == 0; };
  while (!SpinUntil(is_done)) std::this_thread::yield();
  is_inside_task = false;
}

void ThreadPool::Work(int thread) {
  is_inside_task = true;
  uint32_t epoch = 0;
  while (true) {
    epoch = AwaitEpochAfter(epoch);
    if (is_stopping_.load()) return;
    function_(context_, thread);
    pending_.fetch_sub(1, std::memory_order_release);
  }
}

uint32_t ThreadPool::AwaitEpochAfter(uint32_t seen) {
  const auto has_changed = [this, seen] { return epoch_.load() != seen; };
  if (!SpinUntil(has_changed)) {
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    num_sleeping_.fetch_add(1);
    wake_.wait(lock, has_changed);
    num_sleeping_.fetch_sub(1);
  }
  return epoch_.load();
}

void Barrier::Wait(int num_threads) {
  num_arrived_.fetch_add(1, std::memory_order_acq_rel);
  const auto is_complete = [&] { return num_arrived_.load(std::memory_order_acquire) == num_threads; };
  while (!SpinUntil(is_complete)) std::this_thread::yield();
}

namespace {

struct PoolState {
  int num_threads = 1;
  std::shared_ptr<ThreadPool> pool;
  std::mutex mutex;
};

PoolState* state = nullptr;

// In a forked child the workers are gone and locks may be held for ever: leave the old state as it is, start anew.
void ForgetParentsPool() {
  if (state == nullptr) return;
  const int num_threads = state->num_threads;
  state = new PoolState;
  state->num_threads = num_threads;
  is_inside_task = false;
}

PoolState& State() {
  static const bool is_made = [] {
    state = new PoolState;
    pthread_atfork(nullptr, nullptr, ForgetParentsPool);
    // Workers are joined before the process ends.
    std::atexit([] { state->pool.reset(); });
    return true;
  }();
  static_cast<void>(is_made);
  return *state;
}

}  // namespace

std::shared_ptr<ThreadPool> Pool() {
  PoolState& shared = State();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (shared.pool == nullptr) shared.pool = std::make_shared<ThreadPool>(shared.num_threads);
  return shared.pool;
}

void SetNumThreads(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + ", not positive");
  PoolState& shared = State();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  if (num_threads == shared.num_threads) return;
  shared.pool.reset();
  shared.num_threads = num_threads;
}

int NumThreads() {
  PoolState& shared = State();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  return shared.num_threads;
}

}  // namespace headrace
