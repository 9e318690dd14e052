// Memory that the ranks of one host share.
#ifndef HEADRACE_NATIVE_SHARED_REGION_H_
#define HEADRACE_NATIVE_SHARED_REGION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace headrace {

// Two cache lines, since processors fetch lines in pairs.
constexpr size_t kLinePairBytes = 128;

// Where one rank sleeps until another one has done something for it.
struct alignas(kLinePairBytes) Bell {
  std::atomic<uint32_t> num_rings;  // a futex
  std::atomic<uint32_t> is_sleeping;
};

// How much was ever written to a ring, by its only writer, and read, by its only reader.
struct RingCursors {
  alignas(kLinePairBytes) std::atomic<uint64_t> written;
  alignas(kLinePairBytes) std::atomic<uint64_t> read;
};

// One ring as this process sees it.
struct Ring {
  RingCursors* cursors;
  char* data;
  uint64_t num_bytes;
};

// A ring of bytes for every ordered pair of ranks, and a bell for every rank.
//
// The memory has no name: it goes when the last process that has it mapped ends, however that ends. Its pages are
// reserved at once, so that too little memory is an error here and not a SIGBUS later.
class SharedRegion {
 public:
  struct PairBytes {
    int from;
    int to;
    size_t ring_bytes;
  };

  // ring_bytes: of each ring, but for those that `pairs` names; rounded up to whole cache lines.
  //
  // Throws std::invalid_argument, or std::system_error where the memory cannot be had.
  static std::shared_ptr<SharedRegion> Make(int world_size, size_t ring_bytes, const std::vector<PairBytes>& pairs);

  // Maps a region that another process has made. Takes the descriptor over: it is closed with the region.
  static std::shared_ptr<SharedRegion> Attach(int fd);

  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  int fd() const { return fd_; }
  int world_size() const;
  size_t num_bytes() const { return num_bytes_; }
  Bell& bell(int rank) const;
  Ring ring(int from, int to) const;

 private:
  struct Header;
  struct RingPlace;

  SharedRegion(int fd, size_t num_bytes);
  const Header& header() const;
  RingPlace* places() const;

  int fd_;
  size_t num_bytes_;
  char* memory_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SHARED_REGION_H_
