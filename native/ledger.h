// What a group's calls were, how many bytes they moved and how long they took.
#ifndef HEADRACE_NATIVE_LEDGER_H_
#define HEADRACE_NATIVE_LEDGER_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace headrace {

enum class Phase { kPrefill, kDecode };
constexpr size_t kNumPhases = 2;

// Direct: each rank to each other. Two-shot: reduce-scatter and all-gather, both direct; int8: values in 8 bits.
enum class Algorithm { kDirect, kTwoShot, kTwoShotInt8, kPointToPoint };
constexpr size_t kNumAlgorithms = 4;

enum class Operation { kAllReduce, kAllGather, kReduceScatter, kSend, kRecv };

// One call. arrival_ns: when the last of the ranks waited for came, 0 if none was.
struct Call {
  Algorithm algorithm;
  uint64_t payload_bytes;
  uint64_t wire_bytes;
  int64_t start_ns;
  int64_t arrival_ns;
  int64_t end_ns;
};

// Written by the one thread that communicates, read by any.
class Counter {
 public:
  void Add(uint64_t value) { value_.store(get() + value, std::memory_order_relaxed); }
  uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

struct Totals {
  Counter count;
  Counter payload_bytes;
  Counter wire_bytes;
  Counter wait_ns;
  Counter transfer_ns;
};

// A place where a group exchanges something, found by name once and by number in every call.
class Channel {
 public:
  Channel(Operation operation, std::string site) : operation(operation), site(std::move(site)) {}

  void Add(Phase phase, const Call& call) {
    Totals& totals = totals_[static_cast<size_t>(phase)][static_cast<size_t>(call.algorithm)];
    const int64_t wait_ns = call.arrival_ns > call.start_ns ? call.arrival_ns - call.start_ns : 0;
    totals.count.Add(1);
    totals.payload_bytes.Add(call.payload_bytes);
    totals.wire_bytes.Add(call.wire_bytes);
    totals.wait_ns.Add(static_cast<uint64_t>(wait_ns));
    totals.transfer_ns.Add(static_cast<uint64_t>(call.end_ns - call.start_ns - wait_ns));
  }
  const Totals& totals(Phase phase, Algorithm algorithm) const {
    return totals_[static_cast<size_t>(phase)][static_cast<size_t>(algorithm)];
  }

  const Operation operation;
  const std::string site;

 private:
  std::array<std::array<Totals, kNumAlgorithms>, kNumPhases> totals_;
};

// A call as it was, for a picture of where time goes.
struct Event {
  const Channel* channel;
  Phase phase;
  Call call;
};

// Events of the thread that communicates, which also drains them; none unless asked for.
class Trace {
 public:
  // Keeps no more events than this between two drains, and counts those left out. 0 keeps none.
  void Start(size_t max_events) {
    max_events_ = max_events;
    events_.clear();
    events_.reserve(max_events);
    num_dropped_ = 0;
  }
  void Add(const Channel& channel, Phase phase, const Call& call) {
    if (max_events_ == 0) return;
    if (events_.size() == max_events_) {
      ++num_dropped_;
    } else {
      events_.push_back({&channel, phase, call});
    }
  }
  const std::vector<Event>& events() const { return events_; }
  uint64_t num_dropped() const { return num_dropped_; }
  void Clear() { events_.clear(); }

 private:
  size_t max_events_ = 0;
  std::vector<Event> events_;
  uint64_t num_dropped_ = 0;
};

// The channels of a group. They are never removed, so their numbers and addresses stay.
class Ledger {
 public:
  // The channel's number; a new channel on first use.
  int Find(Operation operation, const std::string& site) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < channels_.size(); ++i) {
      if (channels_[i].operation == operation && channels_[i].site == site) return static_cast<int>(i);
    }
    channels_.emplace_back(operation, site);
    return static_cast<int>(channels_.size()) - 1;
  }
  Channel& channel(int number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return channels_.at(static_cast<size_t>(number));
  }
  std::vector<const Channel*> channels() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<const Channel*> all;
    for (const Channel& channel : channels_) all.push_back(&channel);
    return all;
  }

 private:
  mutable std::mutex mutex_;
  std::deque<Channel> channels_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_LEDGER_H_
