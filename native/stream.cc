#include "stream.h"

#include <chrono>
#include <cstdlib>
#include <new>

namespace headrace {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMinLargeBytes = 256 * 1024;

// Large buffers are powers of two, so that batches of nearly the same size take the same ones. Pages that are never
// written to take no memory.
size_t RoundedSize(size_t num_bytes) {
  size_t size = (num_bytes / kAlignment + 1) * kAlignment;
  if (size < kMinLargeBytes) return size;
  for (size = kMinLargeBytes; size < num_bytes;) size *= 2;
  return size;
}

}  // namespace

void Arena::Release::operator()(void* memory) const { std::free(memory); }

// The smallest free buffer that is large enough.
void* Arena::Allocate(size_t num_bytes) {
  num_bytes = RoundedSize(num_bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  Buffer* best = nullptr;
  for (Buffer& buffer : buffers_) {
    const bool fits = buffer.is_free && buffer.num_bytes >= num_bytes;
    if (fits && (best == nullptr || buffer.num_bytes < best->num_bytes)) best = &buffer;
  }
  if (best == nullptr) {
    std::unique_ptr<void, Release> memory(std::aligned_alloc(kAlignment, num_bytes));
    if (memory == nullptr) throw std::bad_alloc();
    buffers_.push_back({std::move(memory), num_bytes, true});
    best = &buffers_.back();
  }
  best->is_free = false;
  return best->memory.get();
}

void Arena::Free(void* buffer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Buffer& candidate : buffers_) {
    if (candidate.memory.get() == buffer) candidate.is_free = true;
  }
}

size_t Arena::num_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const Buffer& buffer : buffers_) total += buffer.num_bytes;
  return total;
}

std::map<std::string, double> Graph::LaunchTimed() const {
  using Clock = std::chrono::steady_clock;
  std::map<std::string, double> seconds;
  for (const GraphOp& op : ops_) {
    const Clock::time_point start = Clock::now();
    op.run();
    seconds[op.name] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  return seconds;
}

}  // namespace headrace
