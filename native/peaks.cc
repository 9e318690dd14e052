#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "targets.h"
#include "thread_pool.h"

namespace headrace {
namespace {

constexpr int64_t kRepeats = 1 << 20;
constexpr int64_t kChunkBytes = 64 * 1024;

std::atomic<uint64_t> sink{0};  // keeps what was read from being optimized away

template <class Task>
double BestSeconds(ThreadPool& pool, int num_passes, const Task& task) {
  double best = 1e30;
  for (int i = 0; i < num_passes; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(task);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

double MeasureReadBytesPerSecond(Target target, int64_t buffer_bytes, int num_passes) {
  const PeakKernels& kernels = HEADRACE_CHOOSE(target, kPeaks);
  // A matrix of ones, written so that every page exists.
  PackedMatrix buffer(Format::kFloat32, RoundUp(buffer_bytes, kChunkBytes) / kChunkBytes * kLanes, kChunkBytes / 64);
  const std::unique_ptr<float[]> row(new float[kChunkBytes / 64]);
  std::fill_n(row.get(), kChunkBytes / 64, 1.0f);
  const PackedLayout& layout = buffer.layout();
  for (int64_t p = 0; p < layout.num_panels; ++p) {
    buffer.WriteRows(target, p * kLanes, {DType::kFloat32, 1, row.get(), layout.columns});
  }
  const std::shared_ptr<ThreadPool> pool = Pool();
  const int num_threads = pool->num_threads();
  const double seconds = BestSeconds(*pool, num_passes, [&](int thread) {
    const Range panels = Part({0, layout.num_panels}, thread, num_threads);
    const uint8_t* begin = buffer.view().weights + panels.begin * kChunkBytes;
    sink += kernels.read(begin, (panels.end - panels.begin) * kChunkBytes);
  });
  return static_cast<double>(layout.num_bytes) / seconds;
}

double MeasureOpsPerSecond(Target target, Format format, int num_passes) {
  const PeakKernels& kernels = HEADRACE_CHOOSE(target, kPeaks);
  const std::shared_ptr<ThreadPool> pool = Pool();
  std::atomic<int64_t> num_ops{0};
  const double seconds = BestSeconds(*pool, num_passes, [&](int) { num_ops += kernels.multiply(format, kRepeats); });
  return static_cast<double>(num_ops.load()) / num_passes / seconds;
}

}  // namespace headrace
