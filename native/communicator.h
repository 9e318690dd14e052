// One rank's end of the world, and the groups of ranks it computes with.
#ifndef HEADRACE_NATIVE_COMMUNICATOR_H_
#define HEADRACE_NATIVE_COMMUNICATOR_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "ledger.h"
#include "range.h"
#include "scratch.h"
#include "transport.h"

namespace headrace {

// Owns the transport, the abort flag and the memory that messages are received into before they are summed. Used by one
// thread at a time, except for Abort.
class Communicator {
 public:
  using MakeTransport = std::function<std::unique_ptr<Transport>(const AbortFlag&)>;
  explicit Communicator(const MakeTransport& make_transport) : transport_(make_transport(abort_)) {}

  int rank() const { return transport_->rank(); }
  int world_size() const { return transport_->world_size(); }
  uint64_t header_bytes() const { return transport_->header_bytes(); }
  Transport& transport() { return *transport_; }

  // Ends what this process waits for, with RankLost(reason), and every later exchange. From any thread.
  void Abort(const std::string& reason) {
    abort_.Set(reason);
    transport_->Wake();
  }

  void Close() { transport_->Close(); }

  // Valid until the next call; grows, never shrinks.
  char* Scratch(size_t num_bytes) { return scratch_.Get(num_bytes); }

 private:
  AbortFlag abort_;
  std::unique_ptr<Transport> transport_;
  ScratchMemory scratch_;
};

// Which all-reduce sends a payload in a group of so many ranks; all ranks agree because nothing else matters.
//
// allows_int8: values may travel in 8 bits, which only messages for which bytes count more than calls do. Then a sum is no
// longer exact, and whether it is depends on the size of the message.
Algorithm AllReduceAlgorithm(size_t payload_bytes, int world_size, bool allows_int8);

// in: [num_rows, row_size]. in and out may be the same if out_dtype is no wider than dtype.
struct AllReduceCall {
  Channel* channel;
  Algorithm algorithm;
  DType dtype;
  int64_t num_rows;
  int64_t row_size;
  const void* in;
  void* out;
  DType out_dtype;

  int64_t count() const { return num_rows * row_size; }
};

// in: [world_size, count].
struct ReduceScatterCall {
  Channel* channel;
  DType dtype;
  int64_t count;
  const void* in;
  void* out;
  DType out_dtype;
};

// out, num_bytes: of each rank.
struct AllGatherCall {
  Channel* channel;
  const void* in;
  std::vector<void*> out;
  std::vector<size_t> num_bytes;
};

// peer: within the group.
struct PointToPointCall {
  Channel* channel;
  int peer;
  void* data;
  size_t num_bytes;
};

// Some ranks of the world in a fixed order, and the ledger of what they exchange as a group. All of them make the same
// calls in the same order. A rank's number within the group is its place in `ranks`.
class GroupCommunicator {
 public:
  // Throws std::invalid_argument unless `ranks` are different ranks of the world, this one among them.
  GroupCommunicator(std::shared_ptr<Communicator> communicator, std::string name, std::vector<int> ranks);

  const std::string& name() const { return name_; }
  int rank() const { return rank_; }
  int world_size() const { return static_cast<int>(ranks_.size()); }
  Ledger& ledger() { return ledger_; }
  const Ledger& ledger() const { return ledger_; }
  Trace& trace() { return trace_; }
  void SetPhase(Phase phase) { phase_.store(phase, std::memory_order_relaxed); }

  void AllReduce(const AllReduceCall& call);
  void ReduceScatter(const ReduceScatterCall& call);
  void AllGather(const AllGatherCall& call);
  void Send(const PointToPointCall& call);
  void Recv(const PointToPointCall& call);

 private:
  class Messages;

  void Direct(const AllReduceCall& call, Call& record);
  void TwoShot(const AllReduceCall& call, Call& record);
  void TwoShotInt8(const AllReduceCall& call, Call& record);
  void Record(Channel& channel, Call& record);
  int64_t num_others() const { return world_size() - 1; }

  std::shared_ptr<Communicator> communicator_;
  const std::string name_;
  const std::vector<int> ranks_;
  int rank_;
  std::atomic<Phase> phase_{Phase::kPrefill};
  Ledger ledger_;
  Trace trace_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_COMMUNICATOR_H_
