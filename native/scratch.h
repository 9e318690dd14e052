#ifndef HEADRACE_NATIVE_SCRATCH_H_
#define HEADRACE_NATIVE_SCRATCH_H_

#include <cstddef>

namespace headrace {

// Memory of the calling thread, aligned to 64 bytes, that grows to the largest request and is kept for the next one,
// which may find anything in it. Throws std::bad_alloc.
char* Scratch(size_t num_bytes);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SCRATCH_H_
