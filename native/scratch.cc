#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace headrace {

char* Scratch(size_t num_bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t capacity = 0;
  if (num_bytes > capacity) {
    constexpr size_t kPageBytes = 4096;
    memory.reset();
    capacity = 0;
    num_bytes = (num_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, num_bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    capacity = num_bytes;
  }
  return memory.get();
}

}  // namespace headrace
