// What carries messages between the ranks of the world, and how its waits are ended from outside.
#ifndef HEADRACE_NATIVE_TRANSPORT_H_
#define HEADRACE_NATIVE_TRANSPORT_H_

#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace headrace {

// CLOCK_MONOTONIC, which all processes of a host share.
inline int64_t NowNs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// A rank that others wait for is gone, or does not keep to what was agreed. Python sees it as errors.RankError.
class RankLost : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Set once, by any thread of this process; from then on every wait and every exchange throws.
class AbortFlag {
 public:
  // The first reason stays.
  void Set(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_set_.load(std::memory_order_relaxed)) return;
    reason_ = reason;
    is_set_.store(true, std::memory_order_release);
  }
  void Check() const {
    if (is_set_.load(std::memory_order_acquire)) throw RankLost(reason_);
  }
  bool is_set() const { return is_set_.load(std::memory_order_acquire); }

 private:
  std::mutex mutex_;
  std::string reason_;
  std::atomic<bool> is_set_{false};
};

struct Outgoing {
  int to;
  const void* data;
  size_t num_bytes;
};

struct Incoming {
  int from;
  void* data;
  size_t num_bytes;
};

// Messages of known sizes between ranks of the world. Those from one rank to another arrive in the order they were sent
// in; the two must agree on their sizes. Used by one thread at a time, except for Wake.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // Sends and receives all of these at once, at most one message to and one from each rank, of any size: two ranks that
  // send each other more than is buffered between them both progress. Returns when every buffer may be used again.
  //
  // start_ns: when this rank came to the exchange. Returns when the last of the senders did, as exactly as this
  // transport can tell; 0 if there was nothing to receive.
  //
  // Empty messages are for the callers to leave out.
  //
  // Throws RankLost once the abort flag is set or if a message has another size than expected; no exchange can follow.
  virtual int64_t Exchange(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives,
                           int64_t start_ns) = 0;

  // Returns as soon as the buffer may be used again; does not wait for the receiver while there is room for the message.
  virtual void Send(const Outgoing& message, int64_t start_ns) { Exchange(&message, 1, nullptr, 0, start_ns); }

  // Ends the sleep of a thread that waits, so that it sees the abort flag. Called from other threads.
  virtual void Wake() {}

  // Before the end of the process, on the thread that communicates.
  virtual void Close() {}

  // What was sent beside the messages' own bytes, as far as it is this transport's doing.
  virtual uint64_t header_bytes() const = 0;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_TRANSPORT_H_
