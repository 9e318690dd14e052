#ifndef HEADRACE_NATIVE_SCRATCH_H_
#define HEADRACE_NATIVE_SCRATCH_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace headrace {

// Between the memory of one thread and of the next one: what prefetchers read past the end of the one would take lines
// away from a core that writes them again and again.
constexpr int64_t kScratchGapBytes = 2 * 4096;

// Memory aligned to 64 bytes that grows to the largest request and is kept for the next one, which may find anything in
// it.
class ScratchMemory {
 public:
  // Throws std::bad_alloc.
  char* Get(size_t num_bytes);

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t capacity_ = 0;
};

// That of the calling thread.
char* Scratch(size_t num_bytes);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SCRATCH_H_
