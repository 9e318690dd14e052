// What this machine can do at best, for kernels to be compared with: loops that only read, or only compute.
#ifndef HEADRACE_NATIVE_PEAKS_H_
#define HEADRACE_NATIVE_PEAKS_H_

#include <cstdint>

#include "packed_matrix.h"
#include "target.h"

namespace headrace {

struct PeakKernels {
  // Reads every cache line of a buffer of whole KiB, from several places at once.
  uint64_t (*read)(const uint8_t* buffer, int64_t num_bytes);
  // Multiplies weights of a format that never leave the L1 cache, as fast as they can be loaded and unpacked; with
  // tiles, where the target has them for the format, as fast as their registers allow. Returns
  // the operations done, a multiply and an add counted as two.
  int64_t (*multiply)(Format format, int64_t num_repeats);
};

// Bytes a second, all threads of the pool reading a buffer of huge pages in the same pass; best of num_passes.
double MeasureReadBytesPerSecond(Target target, int64_t buffer_bytes, int num_passes);
// Operations a second of all threads of the pool; best of num_passes.
double MeasureOpsPerSecond(Target target, Format format, int num_passes);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_PEAKS_H_
