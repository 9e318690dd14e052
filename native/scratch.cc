#include "scratch.h"

#include <new>

namespace headrace {

char* ScratchMemory::Get(size_t num_bytes) {
  if (num_bytes > capacity_) {
    constexpr size_t kPageBytes = 4096;
    memory_.reset();
    capacity_ = 0;
    num_bytes = (num_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, num_bytes)));
    if (memory_ == nullptr) throw std::bad_alloc();
    capacity_ = num_bytes;
  }
  return memory_.get();
}

char* Scratch(size_t num_bytes) {
  thread_local ScratchMemory memory;
  return memory.Get(num_bytes);
}

}  // namespace headrace
