#include "mpi_transport.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace headrace {
namespace {

constexpr int kTag = 1;
// MPI counts in ints.
constexpr size_t kPieceBytes = 256 << 20;
constexpr size_t kMaxStatusBytes = 256;
constexpr size_t kMaxLeavingBytes = 256 << 20;
constexpr auto kNap = std::chrono::microseconds(50);
constexpr int64_t kPollNs = 5 * 1000 * 1000;
constexpr auto kCloseTimeout = std::chrono::seconds(1);

// MPI writes one for each call; none is larger than this.
struct Status {
  alignas(16) char bytes[kMaxStatusBytes];
};

template <class Function>
Function AsFunction(uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

int AsHandle(uintptr_t value, int) { return static_cast<int>(value); }
void* AsHandle(uintptr_t value, void*) { return reinterpret_cast<void*>(value); }

// Calls function(offset, size) for each piece of a message.
template <class Function>
void ForEachPiece(size_t num_bytes, const Function& function) {
  for (size_t offset = 0; offset < num_bytes; offset += kPieceBytes) {
    function(offset, static_cast<int>(std::min(kPieceBytes, num_bytes - offset)));
  }
}

}  // namespace

template <class Handle>
MpiTransport<Handle>::MpiTransport(const MpiLibrary& library, int rank, int world_size, const AbortFlag& abort)
    : isend_(AsFunction<decltype(isend_)>(library.isend)),
      irecv_(AsFunction<decltype(irecv_)>(library.irecv)),
      test_(AsFunction<decltype(test_)>(library.test)),
      iprobe_(AsFunction<decltype(iprobe_)>(library.iprobe)),
      get_count_(AsFunction<decltype(get_count_)>(library.get_count)),
      cancel_(AsFunction<decltype(cancel_)>(library.cancel)),
      error_string_(AsFunction<decltype(error_string_)>(library.error_string)),
      communicator_(AsHandle(library.communicator, Handle())),
      byte_type_(AsHandle(library.byte_type, Handle())),
      rank_(rank),
      world_size_(world_size),
      abort_(abort),
      thread_([this] { SeeOff(); }) {}

template <class Handle>
void MpiTransport<Handle>::Check(int code, const char* function) const {
  if (code == 0) return;
  char text[8192] = "";
  int length = 0;
  error_string_(code, text, &length);
  throw RankLost(std::string(function) + " failed on rank " + std::to_string(rank_) + ": " + text);
}

template <class Handle>
void MpiTransport<Handle>::PostSends(const Outgoing& message, std::vector<Handle>& requests) {
  ForEachPiece(message.num_bytes, [&](size_t offset, int size) {
    const char* data = static_cast<const char*>(message.data) + offset;
    Handle request;
    Check(isend_(data, size, byte_type_, message.to, kTag, communicator_, &request), "MPI_Isend");
    requests.push_back(request);
  });
}

template <class Handle>
void MpiTransport<Handle>::PostReceives(const Incoming& message, std::vector<Handle>& requests) {
  ForEachPiece(message.num_bytes, [&](size_t offset, int size) {
    char* data = static_cast<char*>(message.data) + offset;
    Handle request;
    Check(irecv_(data, size, byte_type_, message.from, kTag, communicator_, &request), "MPI_Irecv");
    requests.push_back(request);
  });
}

template <class Handle>
bool MpiTransport<Handle>::TryReceive(Receiving& receiving) {
  const Incoming& message = receiving.message;
  Status status;
  int has_come = 0;
  Check(iprobe_(message.from, kTag, communicator_, &has_come, &status), "MPI_Iprobe");
  if (has_come == 0) return false;
  int num_bytes = 0;
  Check(get_count_(&status, byte_type_, &num_bytes), "MPI_Get_count");
  const size_t expected = std::min(kPieceBytes, message.num_bytes);
  if (static_cast<size_t>(num_bytes) != expected) {
    throw RankLost("rank " + std::to_string(message.from) + " sent " + std::to_string(num_bytes) + " bytes where rank " +
                   std::to_string(rank_) + " expected " + std::to_string(expected) +
                   ": the ranks no longer make the same calls");
  }
  PostReceives(message, receives_);
  receiving.is_posted = true;
  return true;
}

template <class Handle>
bool MpiTransport<Handle>::RemoveDone(std::vector<Handle>& requests) {
  size_t num_left = 0;
  for (Handle request : requests) {
    Status status;
    int is_done = 0;
    Check(test_(&request, &is_done, &status), "MPI_Test");
    if (is_done == 0) requests[num_left++] = request;
  }
  const bool is_any = num_left < requests.size();
  requests.resize(num_left);
  return is_any;
}

template <class Handle>
int64_t MpiTransport<Handle>::Exchange(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives,
                                       int64_t) {
  abort_.Check();
  receiving_.clear();
  for (const Incoming* message = receives; message != receives + num_receives; ++message) {
    receiving_.push_back({*message, false});
  }
  try {
    for (const Outgoing* message = sends; message != sends + num_sends; ++message) PostSends(*message, sends_);
    int64_t arrival_ns = 0;
    int64_t idle_since_ns = 0;
    for (size_t num_to_come = receiving_.size(); num_to_come > 0 || !sends_.empty() || !receives_.empty();) {
      bool is_any = false;
      for (Receiving& receiving : receiving_) {
        if (receiving.is_posted || !TryReceive(receiving)) continue;
        is_any = true;
        if (--num_to_come == 0) arrival_ns = NowNs();
      }
      is_any |= RemoveDone(sends_);
      is_any |= RemoveDone(receives_);
      if (is_any) {
        idle_since_ns = 0;
        continue;
      }
      abort_.Check();
      const int64_t now_ns = NowNs();
      if (idle_since_ns == 0) idle_since_ns = now_ns;
      if (now_ns - idle_since_ns < kPollNs) {
        sched_yield();
      } else {
        std::this_thread::sleep_for(kNap);
      }
    }
    return arrival_ns;
  } catch (...) {
    Forsake();
    throw;
  }
}

// After a failure: as far as MPI still can, nothing more is written to buffers that are about to be freed.
template <class Handle>
void MpiTransport<Handle>::Forsake() {
  for (Handle& request : receives_) cancel_(&request);
  receives_.clear();
  sends_.clear();
}

template <class Handle>
void MpiTransport<Handle>::Send(const Outgoing& message, int64_t) {
  abort_.Check();
  AwaitRoom(message.num_bytes);
  Leaving leaving = {std::make_unique<char[]>(message.num_bytes), message.num_bytes, {}};
  memcpy(leaving.data.get(), message.data, message.num_bytes);
  PostSends({message.to, leaving.data.get(), message.num_bytes}, leaving.requests);
  // A short message has often left by now.
  RemoveDone(leaving.requests);
  if (leaving.requests.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  leaving_bytes_ += leaving.num_bytes;
  leaving_.push_back(std::move(leaving));
  changed_.notify_all();
}

template <class Handle>
void MpiTransport<Handle>::AwaitRoom(size_t num_bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (leaving_bytes_ > 0 && leaving_bytes_ + num_bytes > kMaxLeavingBytes) {
    changed_.wait_for(lock, std::chrono::milliseconds(5));
    abort_.Check();
  }
}

template <class Handle>
bool MpiTransport<Handle>::RemoveLeft() {
  bool is_any = false;
  for (auto leaving = leaving_.begin(); leaving != leaving_.end();) {
    RemoveDone(leaving->requests);
    if (leaving->requests.empty()) {
      leaving_bytes_ -= leaving->num_bytes;
      leaving = leaving_.erase(leaving);
      is_any = true;
    } else {
      ++leaving;
    }
  }
  return is_any;
}

template <class Handle>
void MpiTransport<Handle>::SeeOff() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!is_closing_) {
    if (leaving_.empty()) {
      changed_.wait(lock);
      continue;
    }
    try {
      if (RemoveLeft()) changed_.notify_all();
    } catch (const RankLost&) {
      return;  // whoever waits for a message next is told by MPI as well
    }
    if (!leaving_.empty()) changed_.wait_for(lock, 2 * kNap);
  }
}

// Gives what is leaving a moment; what then remains stays where it is, since MPI may still read it.
template <class Handle>
void MpiTransport<Handle>::Close() {
  if (!thread_.joinable()) return;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kCloseTimeout, [this] { return leaving_.empty() || abort_.is_set(); });
    is_closing_ = true;
    changed_.notify_all();
  }
  thread_.join();
  for (Leaving& leaving : leaving_) static_cast<void>(leaving.data.release());
}

std::unique_ptr<Transport> MakeMpiTransport(const MpiLibrary& library, int rank, int world_size, const AbortFlag& abort) {
  if (library.status_bytes > kMaxStatusBytes) {
    throw std::invalid_argument("this MPI's MPI_Status has " + std::to_string(library.status_bytes) +
                                " bytes; known are up to " + std::to_string(kMaxStatusBytes));
  }
  if (library.handle_bytes == sizeof(int)) return std::make_unique<MpiTransport<int>>(library, rank, world_size, abort);
  if (library.handle_bytes == sizeof(void*)) {
    return std::make_unique<MpiTransport<void*>>(library, rank, world_size, abort);
  }
  throw std::invalid_argument("this MPI's handles have " + std::to_string(library.handle_bytes) +
                              " bytes: neither those of an int nor those of a pointer");
}

}  // namespace headrace
