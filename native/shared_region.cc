#include "shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

namespace headrace {
namespace {

constexpr uint64_t kMagic = 0x3165636172646561;
constexpr int kMaxWorldSize = 1024;

size_t RoundUp(size_t size) { return (size + kLinePairBytes - 1) / kLinePairBytes * kLinePairBytes; }

[[noreturn]] void ThrowErrno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// A descriptor of shared memory that is really there, and whose size stays.
int MakeMemory(size_t num_bytes) {
  const int fd = memfd_create("headrace-ranks", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) ThrowErrno(errno, "shared memory between ranks");
  const int error = posix_fallocate(fd, 0, static_cast<off_t>(num_bytes));
  if (error != 0) {
    close(fd);
    ThrowErrno(error, std::to_string(num_bytes) + " bytes of shared memory between ranks");
  }
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  return fd;
}

size_t SizeOf(int fd) {
  struct stat status;
  if (fstat(fd, &status) != 0) ThrowErrno(errno, "the shared memory of the ranks");
  return static_cast<size_t>(status.st_size);
}

}  // namespace

struct SharedRegion::Header {
  uint64_t magic;
  uint64_t world_size;
};

// A ring's cursors lie at `offset`, its data behind them.
struct SharedRegion::RingPlace {
  uint64_t offset;
  uint64_t num_bytes;
};

std::shared_ptr<SharedRegion> SharedRegion::Make(int world_size, size_t ring_bytes, const std::vector<PairBytes>& pairs) {
  if (world_size < 1 || world_size > kMaxWorldSize) {
    throw std::invalid_argument("world_size is " + std::to_string(world_size) + "; allowed: 1 to 1024");
  }
  const auto size = static_cast<size_t>(world_size);
  std::vector<RingPlace> places(size * size, RingPlace{0, RoundUp(ring_bytes)});
  for (const PairBytes& pair : pairs) {
    if (pair.from < 0 || pair.to < 0 || pair.from >= world_size || pair.to >= world_size) {
      throw std::invalid_argument("a ring from rank " + std::to_string(pair.from) + " to rank " +
                                  std::to_string(pair.to) + " in a world of " + std::to_string(world_size));
    }
    places[static_cast<size_t>(pair.from) * size + static_cast<size_t>(pair.to)].num_bytes = RoundUp(pair.ring_bytes);
  }
  size_t num_bytes = RoundUp(sizeof(Header)) + size * sizeof(Bell) + RoundUp(places.size() * sizeof(RingPlace));
  for (size_t i = 0; i < places.size(); ++i) {
    const bool is_to_itself = i / size == i % size;
    if (is_to_itself) places[i].num_bytes = 0;
    places[i].offset = num_bytes;
    if (places[i].num_bytes > 0) num_bytes += sizeof(RingCursors) + places[i].num_bytes;
  }
  const std::shared_ptr<SharedRegion> region(new SharedRegion(MakeMemory(num_bytes), num_bytes));
  new (region->memory_) Header{kMagic, size};
  for (size_t i = 0; i < places.size(); ++i) new (region->places() + i) RingPlace(places[i]);
  return region;
}

std::shared_ptr<SharedRegion> SharedRegion::Attach(int fd) {
  const size_t num_bytes = SizeOf(fd);
  if (num_bytes < sizeof(Header)) throw std::invalid_argument("this is not the shared memory of ranks: it is too small");
  std::shared_ptr<SharedRegion> region(new SharedRegion(fd, num_bytes));
  if (region->header().magic != kMagic) {
    region->fd_ = -1;  // not ours to close
    throw std::invalid_argument("this is not the shared memory of ranks");
  }
  return region;
}

SharedRegion::SharedRegion(int fd, size_t num_bytes) : fd_(fd), num_bytes_(num_bytes) {
  void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) ThrowErrno(errno, "mapping the shared memory of the ranks");
  memory_ = static_cast<char*>(memory);
}

SharedRegion::~SharedRegion() {
  munmap(memory_, num_bytes_);
  if (fd_ >= 0) close(fd_);
}

const SharedRegion::Header& SharedRegion::header() const { return *reinterpret_cast<const Header*>(memory_); }

int SharedRegion::world_size() const { return static_cast<int>(header().world_size); }

Bell& SharedRegion::bell(int rank) const {
  return reinterpret_cast<Bell*>(memory_ + RoundUp(sizeof(Header)))[rank];
}

SharedRegion::RingPlace* SharedRegion::places() const {
  return reinterpret_cast<RingPlace*>(memory_ + RoundUp(sizeof(Header)) + header().world_size * sizeof(Bell));
}

Ring SharedRegion::ring(int from, int to) const {
  const RingPlace& place = places()[static_cast<size_t>(from) * header().world_size + static_cast<size_t>(to)];
  char* memory = memory_ + place.offset;
  return {reinterpret_cast<RingCursors*>(memory), memory + sizeof(RingCursors), place.num_bytes};
}

}  // namespace headrace
