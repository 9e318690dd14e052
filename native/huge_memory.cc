#include "huge_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace headrace {
namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

uint8_t* Map(size_t num_bytes) {
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<uint8_t*>(memory);
}

size_t RoundUpTo(size_t value, size_t step) { return (value + step - 1) / step * step; }

// num_bytes and what is left of their last page.
size_t WholePages(size_t num_bytes) { return RoundUpTo(num_bytes, static_cast<size_t>(sysconf(_SC_PAGESIZE))); }

void Unmap(uint8_t* from, uint8_t* to) {
  if (from < to) munmap(from, static_cast<size_t>(to - from));
}

}  // namespace

void UnmapMemory::operator()(uint8_t* memory) const { Unmap(memory, memory + WholePages(num_bytes)); }

MappedMemory MapMemory(size_t num_bytes) {
  if (num_bytes < kHugePageBytes) return {Map(num_bytes), UnmapMemory{num_bytes}};
  uint8_t* const mapped = Map(num_bytes + kHugePageBytes);
  uint8_t* const end = mapped + WholePages(num_bytes + kHugePageBytes);
  uint8_t* const memory =
      mapped + (RoundUpTo(reinterpret_cast<uintptr_t>(mapped), kHugePageBytes) - reinterpret_cast<uintptr_t>(mapped));
  Unmap(mapped, memory);
  Unmap(memory + WholePages(num_bytes), end);
#ifdef MADV_HUGEPAGE
  madvise(memory, num_bytes, MADV_HUGEPAGE);  // a wish: failing is no error
#endif
  return {memory, UnmapMemory{num_bytes}};
}

}  // namespace headrace
