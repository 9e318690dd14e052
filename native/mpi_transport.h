// Messages through MPI, of whichever library mpi4py has loaded: no header of MPI's is needed to build this.
#ifndef HEADRACE_NATIVE_MPI_TRANSPORT_H_
#define HEADRACE_NATIVE_MPI_TRANSPORT_H_

#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transport.h"

namespace headrace {

// Addresses of the functions that are called, and two handles, all from the library that is loaded.
struct MpiLibrary {
  uintptr_t isend;
  uintptr_t irecv;
  uintptr_t test;
  uintptr_t iprobe;
  uintptr_t get_count;
  uintptr_t cancel;
  uintptr_t error_string;
  uintptr_t communicator;  // nobody else sends in it; returns errors
  uintptr_t byte_type;
  size_t handle_bytes;  // sizeof(MPI_Comm), MPI_Datatype and MPI_Request
  size_t status_bytes;  // sizeof(MPI_Status)
};

// Handle: int in MPICH and its kin, a pointer in Open MPI and in the standard ABI of MPI 5.
//
// MPI must have been started with MPI_THREAD_MULTIPLE: a message that was sent but not yet fetched needs somebody to call
// MPI until it has gone, while this rank may be busy or asleep elsewhere. A thread of this class does, and sleeps while
// there is no such message.
//
// A rank that waits polls, offering its core, and after some milliseconds takes naps. When the last of the others came is
// what it sees: the time when MPI first reports a message.
template <class Handle>
class MpiTransport : public Transport {
 public:
  MpiTransport(const MpiLibrary& library, int rank, int world_size, const AbortFlag& abort);
  ~MpiTransport() override { Close(); }

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  int64_t Exchange(const Outgoing* sends, int num_sends, const Incoming* receives, int num_receives,
                   int64_t start_ns) override;
  void Send(const Outgoing& message, int64_t start_ns) override;
  void Close() override;
  // What MPI adds to messages is not told.
  uint64_t header_bytes() const override { return 0; }

 private:
  // A copy of a message that is leaving.
  struct Leaving {
    std::unique_ptr<char[]> data;
    size_t num_bytes;
    std::vector<Handle> requests;
  };
  struct Receiving {
    Incoming message;
    bool is_posted;
  };

  void PostSends(const Outgoing& message, std::vector<Handle>& requests);
  void PostReceives(const Incoming& message, std::vector<Handle>& requests);
  // Whether the message has come; then it is being received.
  bool TryReceive(Receiving& receiving);
  // Removes what is done; whether anything was.
  bool RemoveDone(std::vector<Handle>& requests);
  void Forsake();
  void AwaitRoom(size_t num_bytes);
  // What the thread does: sees messages off.
  void SeeOff();
  bool RemoveLeft();
  void Check(int code, const char* function) const;

  int (*const isend_)(const void*, int, Handle, int, int, Handle, Handle*);
  int (*const irecv_)(void*, int, Handle, int, int, Handle, Handle*);
  int (*const test_)(Handle*, int*, void*);
  int (*const iprobe_)(int, int, Handle, int*, void*);
  int (*const get_count_)(const void*, Handle, int*);
  int (*const cancel_)(Handle*);
  int (*const error_string_)(int, char*, int*);
  const Handle communicator_;
  const Handle byte_type_;
  const int rank_;
  const int world_size_;
  const AbortFlag& abort_;

  std::vector<Receiving> receiving_;
  std::vector<Handle> sends_;
  std::vector<Handle> receives_;

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::list<Leaving> leaving_;
  size_t leaving_bytes_ = 0;
  bool is_closing_ = false;
  std::thread thread_;
};

// Throws std::invalid_argument if handles are neither ints nor pointers.
std::unique_ptr<Transport> MakeMpiTransport(const MpiLibrary& library, int rank, int world_size, const AbortFlag& abort);

}  // namespace headrace

#endif  // HEADRACE_NATIVE_MPI_TRANSPORT_H_
