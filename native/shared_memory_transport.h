// Messages through rings of bytes in shared memory.
#ifndef HEADRACE_NATIVE_SHARED_MEMORY_TRANSPORT_H_
#define HEADRACE_NATIVE_SHARED_MEMORY_TRANSPORT_H_

#include <memory>
#include <vector>

#include "shared_region.h"
#include "transport.h"

namespace headrace {

// A message is a header of 16 bytes, its size and its sender's time, and then its bytes, up to a whole cache line. What
// does not fit a ring follows piece by piece while the other end reads.
//
// A rank that waits spins for some tens of microseconds, offers its core to others for some hundreds, and then sleeps at
// its bell. Where ranks outnumber cores it does not spin: whoever it waits for may need that very core.
class SharedMemoryTransport : public Transport {
 public:
  SharedMemoryTransport(std::shared_ptr<SharedRegion> region, int rank, const AbortFlag& abort);

  int rank() const override { return rank_; }
  int world_size() const override { return region_->world_size(); }
  int64_t Exchange(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives,
                   int64_t start_ns) override;
  void Wake() override;
  uint64_t header_bytes() const override { return header_bytes_.load(std::memory_order_relaxed); }

 private:
  // One end of a ring: its own cursor, and the other end's as last seen.
  struct End {
    Ring ring;
    Bell* bell;  // of the rank at the other end
    uint64_t mine;
    uint64_t theirs;
  };
  struct Sending {
    End* end;
    const char* data;
    size_t left;
    bool has_header;
    bool is_done;
  };
  struct Receiving {
    End* end;
    int from;
    char* data;
    size_t left;
    bool has_header;
    bool is_done;
  };
  enum class Progress { kNone, kSome, kAll };

  void Begin(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives);
  Progress Move(int64_t start_ns);
  bool Push(Sending& sending, int64_t start_ns);
  bool Pull(Receiving& receiving);
  void ReadHeader(Receiving& receiving);
  Progress Sleep(int64_t start_ns);

  std::shared_ptr<SharedRegion> region_;
  const int rank_;
  const AbortFlag& abort_;
  const int64_t spin_ns_;
  Bell& bell_;
  std::vector<End> outgoing_;  // by the rank at the other end
  std::vector<End> incoming_;
  // Of the exchange in progress.
  std::vector<Sending> sending_;
  std::vector<Receiving> receiving_;
  int64_t last_arrival_ns_ = 0;
  std::atomic<uint64_t> header_bytes_{0};
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_SHARED_MEMORY_TRANSPORT_H_
