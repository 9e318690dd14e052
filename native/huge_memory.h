// Memory for what kernels stream through: weights and caches.
#ifndef HEADRACE_NATIVE_HUGE_MEMORY_H_
#define HEADRACE_NATIVE_HUGE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace headrace {

struct UnmapMemory {
  size_t num_bytes;
  void operator()(uint8_t* memory) const;
};
using MappedMemory = std::unique_ptr<uint8_t, UnmapMemory>;

// Zeroed memory that the system hands over page by page as it is written, in huge pages where it has them: streaming
// 4 KiB pages costs a TLB miss for each 64 vectors. From the size of a huge page on it begins at the start of one, or
// up to two of them would come as small pages; less is aligned to a page. Throws std::bad_alloc.
MappedMemory MapMemory(size_t num_bytes);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_HUGE_MEMORY_H_
