#include "shared_memory_transport.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <string>
#include <utility>

namespace headrace {
namespace {

struct MessageHeader {
  uint64_t num_bytes;
  int64_t start_ns;
};

constexpr size_t kLineBytes = 64;
// What is written before the reader is told, so that it reads the first piece while the second one is written.
constexpr size_t kPieceBytes = 16 * 1024;
constexpr int64_t kSpinNs = 30 * 1000;
constexpr int64_t kYieldNs = 200 * 1000;
constexpr long kSleepNs = 5 * 1000 * 1000;

uint64_t RoundUpToLine(uint64_t cursor) { return (cursor + kLineBytes - 1) / kLineBytes * kLineBytes; }

int NumCpus() {
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void FutexWait(std::atomic<uint32_t>& word, uint32_t expected) {
  const timespec timeout = {0, kSleepNs};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void RingBell(Bell& bell) {
  bell.num_rings.fetch_add(1);
  syscall(SYS_futex, &bell.num_rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// After a cursor was moved. The fence pairs with the one between a sleeper's flag and its last look at the cursors: one
// of the two sees what the other has written.
void WakeIfAsleep(Bell& bell) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (bell.is_sleeping.load(std::memory_order_relaxed) != 0) RingBell(bell);
}

void CopyIn(const Ring& ring, uint64_t cursor, const char* from, size_t num_bytes) {
  const uint64_t at = cursor % ring.num_bytes;
  const size_t first = std::min<size_t>(num_bytes, ring.num_bytes - at);
  memcpy(ring.data + at, from, first);
  memcpy(ring.data, from + first, num_bytes - first);
}

void CopyOut(const Ring& ring, uint64_t cursor, char* to, size_t num_bytes) {
  const uint64_t at = cursor % ring.num_bytes;
  const size_t first = std::min<size_t>(num_bytes, ring.num_bytes - at);
  memcpy(to, ring.data + at, first);
  memcpy(to + first, ring.data, num_bytes - first);
}

std::string RankName(int rank) { return "rank " + std::to_string(rank); }

void CheckRing(const Ring& ring, int from, int to) {
  if (ring.num_bytes == 0) {
    throw std::invalid_argument("there is no ring from " + RankName(from) + " to " + RankName(to));
  }
}

// What a rank does between two looks: pause, then offer its core, then sleep.
class Patience {
 public:
  explicit Patience(int64_t spin_ns) : spin_ns_(spin_ns) {}

  void Reset() { num_waits_ = 0; }

  // Waits for less than a microsecond, or as long as others want the core. False when it is time to sleep.
  bool Wait() {
    constexpr int kPausesPerLookAtClock = 16;
    if (num_waits_++ % kPausesPerLookAtClock == 0) {
      const int64_t now_ns = NowNs();
      if (num_waits_ == 1) since_ns_ = now_ns;
      waited_ns_ = now_ns - since_ns_;
    }
    if (waited_ns_ > spin_ns_ + kYieldNs) return false;
    if (waited_ns_ < spin_ns_) {
      Pause();
    } else {
      sched_yield();
    }
    return true;
  }

 private:
  const int64_t spin_ns_;
  int num_waits_ = 0;
  int64_t since_ns_ = 0;
  int64_t waited_ns_ = 0;
};

}  // namespace

SharedMemoryTransport::SharedMemoryTransport(std::shared_ptr<SharedRegion> region, int rank, const AbortFlag& abort)
    : region_(std::move(region)),
      rank_(rank),
      abort_(abort),
      spin_ns_(region_->world_size() <= NumCpus() ? kSpinNs : 0),
      bell_(region_->bell(rank)) {
  for (int peer = 0; peer < world_size(); ++peer) {
    outgoing_.push_back({region_->ring(rank, peer), &region_->bell(peer), 0, 0});
    incoming_.push_back({region_->ring(peer, rank), &region_->bell(peer), 0, 0});
  }
}

int64_t SharedMemoryTransport::Exchange(const Outgoing* sends, int num_sends, const Incoming* receives,
                                        int num_receives, int64_t start_ns) {
  abort_.Check();
  Begin(sends, num_sends, receives, num_receives);
  Patience patience(spin_ns_);
  for (;;) {
    Progress progress = Move(start_ns);
    if (progress == Progress::kNone) {
      abort_.Check();
      if (patience.Wait()) continue;
      progress = Sleep(start_ns);
    }
    if (progress == Progress::kAll) return last_arrival_ns_;
    if (progress == Progress::kSome) patience.Reset();
  }
}

void SharedMemoryTransport::Wake() { RingBell(bell_); }

void SharedMemoryTransport::Begin(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives) {
  last_arrival_ns_ = 0;
  sending_.clear();
  receiving_.clear();
  for (const Outgoing* send = sends; send != sends + num_sends; ++send) {
    End& end = outgoing_.at(static_cast<size_t>(send->to));
    CheckRing(end.ring, rank_, send->to);
    sending_.push_back({&end, static_cast<const char*>(send->data), send->num_bytes, false, false});
  }
  for (const Incoming* receive = receives; receive != receives + num_receives; ++receive) {
    End& end = incoming_.at(static_cast<size_t>(receive->from));
    CheckRing(end.ring, receive->from, rank_);
    receiving_.push_back({&end, receive->from, static_cast<char*>(receive->data), receive->num_bytes, false, false});
  }
}

SharedMemoryTransport::Progress SharedMemoryTransport::Move(int64_t start_ns) {
  bool is_some = false;
  bool is_all = true;
  for (Sending& sending : sending_) {
    if (!sending.is_done) is_some |= Push(sending, start_ns);
    is_all &= sending.is_done;
  }
  for (Receiving& receiving : receiving_) {
    if (!receiving.is_done) is_some |= Pull(receiving);
    is_all &= receiving.is_done;
  }
  if (is_all) return Progress::kAll;
  return is_some ? Progress::kSome : Progress::kNone;
}

// Writes as much as there is room for, and tells the reader after each piece. A message's last piece is filled up to a
// whole line, over room that need not be free: nothing is written there.
bool SharedMemoryTransport::Push(Sending& sending, int64_t start_ns) {
  End& end = *sending.end;
  const auto room = [&end](size_t wanted) {
    const auto left = [&end] { return static_cast<int64_t>(end.ring.num_bytes - (end.mine - end.theirs)); };
    if (left() < static_cast<int64_t>(wanted)) end.theirs = end.ring.cursors->read.load(std::memory_order_acquire);
    return static_cast<size_t>(std::max<int64_t>(0, left()));
  };
  if (!sending.has_header) {
    if (room(kLineBytes) < kLineBytes) return false;
    const MessageHeader header = {sending.left, start_ns};
    CopyIn(end.ring, end.mine, reinterpret_cast<const char*>(&header), sizeof header);
    end.mine += sizeof header;
    sending.has_header = true;
    header_bytes_.store(header_bytes() + sizeof header, std::memory_order_relaxed);
  } else if (room(1) == 0) {
    return false;
  }
  do {
    const size_t wanted = std::min(sending.left, kPieceBytes);
    const size_t num_bytes = std::min(wanted, room(wanted));
    CopyIn(end.ring, end.mine, sending.data, num_bytes);
    end.mine += num_bytes;
    sending.data += num_bytes;
    sending.left -= num_bytes;
    sending.is_done = sending.left == 0;
    if (sending.is_done) end.mine = RoundUpToLine(end.mine);
    end.ring.cursors->written.store(end.mine, std::memory_order_release);
    WakeIfAsleep(*end.bell);
  } while (!sending.is_done && room(1) > 0);
  return true;
}

// Reads as much as there is, and tells the writer once.
bool SharedMemoryTransport::Pull(Receiving& receiving) {
  End& end = *receiving.end;
  end.theirs = end.ring.cursors->written.load(std::memory_order_acquire);
  if (end.theirs == end.mine) return false;
  if (!receiving.has_header) ReadHeader(receiving);
  const size_t num_bytes = std::min<size_t>(receiving.left, end.theirs - end.mine);
  CopyOut(end.ring, end.mine, receiving.data, num_bytes);
  end.mine += num_bytes;
  receiving.data += num_bytes;
  receiving.left -= num_bytes;
  receiving.is_done = receiving.left == 0;
  if (receiving.is_done) end.mine = RoundUpToLine(end.mine);
  end.ring.cursors->read.store(end.mine, std::memory_order_release);
  WakeIfAsleep(*end.bell);
  return true;
}

void SharedMemoryTransport::ReadHeader(Receiving& receiving) {
  End& end = *receiving.end;
  MessageHeader header;
  CopyOut(end.ring, end.mine, reinterpret_cast<char*>(&header), sizeof header);
  end.mine += sizeof header;
  if (header.num_bytes != receiving.left) {
    throw RankLost(RankName(receiving.from) + " sent " + std::to_string(header.num_bytes) + " bytes where " +
                   RankName(rank_) + " expected " + std::to_string(receiving.left) +
                   ": the ranks no longer make the same calls");
  }
  receiving.has_header = true;
  last_arrival_ns_ = std::max(last_arrival_ns_, header.start_ns);
}

SharedMemoryTransport::Progress SharedMemoryTransport::Sleep(int64_t start_ns) {
  bell_.is_sleeping.store(1, std::memory_order_relaxed);
  const uint32_t num_rings = bell_.num_rings.load(std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const Progress progress = Move(start_ns);
  if (progress == Progress::kNone && !abort_.is_set()) FutexWait(bell_.num_rings, num_rings);
  bell_.is_sleeping.store(0, std::memory_order_relaxed);
  return progress;
}

}  // namespace headrace
