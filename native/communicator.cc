#include "communicator.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "reduce.h"

namespace headrace {
namespace {

constexpr size_t kAlignment = 64;

// Of two ranks the direct exchange sends no more bytes than the two-shot one, and sums in half the rounds but twice the
// additions. Of n it sends n / 2 times as many, which only messages without weight are worth: at 4 KiB and four ranks it
// takes 10 us where two shots take 17, at 16 KiB 25 where they take 14 (`python -m bench.collectives`, shared memory).
constexpr size_t kDirectMaxBytesOfTwo = 256 * 1024;
constexpr size_t kDirectMaxBytes = 2 * 1024;
constexpr size_t kInt8MinBytes = 64 * 1024;

size_t RoundUp(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

const char* At(const void* memory, size_t offset) { return static_cast<const char*>(memory) + offset; }
char* At(void* memory, size_t offset) { return static_cast<char*>(memory) + offset; }

// Elements that rank `rank` sums: contiguous, in rank order, larger parts first (costs/sharding.py, shard_range).
Range Shard(int64_t count, int rank, int world_size) {
  const int64_t base = count / world_size;
  const int64_t extra = count % world_size;
  const int64_t begin = rank * base + std::min<int64_t>(rank, extra);
  return {begin, begin + base + (rank < extra ? 1 : 0)};
}

}  // namespace

Algorithm AllReduceAlgorithm(size_t payload_bytes, int world_size, bool allows_int8) {
  if (allows_int8 && payload_bytes >= kInt8MinBytes) return Algorithm::kTwoShotInt8;
  const size_t max_bytes = world_size == 2 ? kDirectMaxBytesOfTwo : kDirectMaxBytes;
  return payload_bytes <= max_bytes ? Algorithm::kDirect : Algorithm::kTwoShot;
}

// The messages of one exchange, by ranks of the group, and the bytes that they move. Empty ones are left out: both ends
// know that they are.
class GroupCommunicator::Messages {
 public:
  explicit Messages(const GroupCommunicator& group) : group_(group) {}

  void Send(int to, const void* data, size_t num_bytes) {
    if (num_bytes > 0) sends_.push_back({group_.ranks_[static_cast<size_t>(to)], data, num_bytes});
  }
  void Receive(int from, void* data, size_t num_bytes) {
    if (num_bytes > 0) receives_.push_back({group_.ranks_[static_cast<size_t>(from)], data, num_bytes});
  }

  // Counts what it sends. When the others came counts in the first exchange of a call only: later ones begin with it.
  void Exchange(Call& record) {
    const bool is_first = record.arrival_ns == 0;
    const int64_t start_ns = is_first ? record.start_ns : NowNs();
    const int64_t arrival_ns = group_.communicator_->transport().Exchange(
        sends_.data(), static_cast<int>(sends_.size()), receives_.data(), static_cast<int>(receives_.size()), start_ns);
    if (is_first) record.arrival_ns = arrival_ns;
    for (const Outgoing& send : sends_) record.wire_bytes += send.num_bytes;
  }

 private:
  const GroupCommunicator& group_;
  std::vector<Outgoing> sends_;
  std::vector<Incoming> receives_;
};

GroupCommunicator::GroupCommunicator(std::shared_ptr<Communicator> communicator, std::string name, std::vector<int> ranks)
    : communicator_(std::move(communicator)), name_(std::move(name)), ranks_(std::move(ranks)) {
  const std::set<int> distinct(ranks_.begin(), ranks_.end());
  const auto own = std::find(ranks_.begin(), ranks_.end(), communicator_->rank());
  if (distinct.size() != ranks_.size() || own == ranks_.end() || *distinct.begin() < 0 ||
      *distinct.rbegin() >= communicator_->world_size()) {
    throw std::invalid_argument("the ranks of a group are different ranks of the world, this one among them");
  }
  rank_ = static_cast<int>(own - ranks_.begin());
}

void GroupCommunicator::Record(Channel& channel, Call& record) {
  record.end_ns = NowNs();
  const Phase phase = phase_.load(std::memory_order_relaxed);
  channel.Add(phase, record);
  trace_.Add(channel, phase, record);
}

void GroupCommunicator::AllReduce(const AllReduceCall& call) {
  const size_t payload_bytes = static_cast<size_t>(call.count()) * ElementBytes(call.dtype);
  Call record = {call.algorithm, payload_bytes, 0, NowNs(), 0, 0};
  switch (call.algorithm) {
    case Algorithm::kDirect:
      Direct(call, record);
      break;
    case Algorithm::kTwoShot:
      TwoShot(call, record);
      break;
    case Algorithm::kTwoShotInt8:
      TwoShotInt8(call, record);
      break;
    case Algorithm::kPointToPoint:
      throw std::invalid_argument("no all-reduce is point to point");
  }
  Record(*call.channel, record);
}

void GroupCommunicator::Direct(const AllReduceCall& call, Call& record) {
  const size_t num_bytes = record.payload_bytes;
  char* scratch = communicator_->Scratch(static_cast<size_t>(num_others()) * RoundUp(num_bytes));
  Messages messages(*this);
  std::vector<const void*> summands;
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer == rank_) {
      summands.push_back(call.in);
      continue;
    }
    messages.Send(peer, call.in, num_bytes);
    messages.Receive(peer, scratch, num_bytes);
    summands.push_back(scratch);
    scratch += RoundUp(num_bytes);
  }
  messages.Exchange(record);
  Reduce().sum(summands, call.dtype, call.count(), call.out, call.out_dtype);
}

void GroupCommunicator::TwoShot(const AllReduceCall& call, Call& record) {
  const size_t in_bytes = ElementBytes(call.dtype);
  const size_t out_bytes = ElementBytes(call.out_dtype);
  const auto shard = [&](int rank) { return Shard(call.count(), rank, world_size()); };
  const auto begin = [&](int rank) { return static_cast<size_t>(shard(rank).begin); };
  const auto size = [&](int rank) { return static_cast<size_t>(shard(rank).end - shard(rank).begin); };

  char* scratch = communicator_->Scratch(static_cast<size_t>(num_others()) * RoundUp(size(rank_) * in_bytes));
  Messages scatter(*this);
  Messages gather(*this);
  std::vector<const void*> summands;
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer == rank_) {
      summands.push_back(At(call.in, begin(rank_) * in_bytes));
      continue;
    }
    scatter.Send(peer, At(call.in, begin(peer) * in_bytes), size(peer) * in_bytes);
    scatter.Receive(peer, scratch, size(rank_) * in_bytes);
    summands.push_back(scratch);
    scratch += RoundUp(size(rank_) * in_bytes);
    gather.Send(peer, At(call.out, begin(rank_) * out_bytes), size(rank_) * out_bytes);
    gather.Receive(peer, At(call.out, begin(peer) * out_bytes), size(peer) * out_bytes);
  }
  scatter.Exchange(record);
  Reduce().sum(summands, call.dtype, static_cast<int64_t>(size(rank_)), At(call.out, begin(rank_) * out_bytes),
               call.out_dtype);
  gather.Exchange(record);
}

// As the two-shot algorithm, in messages of groups. This rank's own share of the payload, and its sum, pass through 8 bits
// like the others', so that all ranks get the same bits and none of them depends on which rank adds up which group.
void GroupCommunicator::TwoShotInt8(const AllReduceCall& call, Call& record) {
  const GroupedRows rows = {call.num_rows, call.row_size};
  const auto shard = [&](int rank) { return Shard(rows.num_groups(), rank, world_size()); };
  const auto bytes = [&](int rank) { return static_cast<size_t>(rows.MessageBytes(shard(rank))); };
  const auto first = [&](int rank) { return static_cast<size_t>(rows.Start(shard(rank).begin)); };

  size_t scratch_bytes = 0;
  const auto reserve = [&scratch_bytes](size_t num_bytes) {
    const size_t offset = scratch_bytes;
    scratch_bytes += RoundUp(num_bytes);
    return offset;
  };
  std::vector<size_t> outgoing, incoming, results;  // offsets, by rank
  for (int peer = 0; peer < world_size(); ++peer) {
    outgoing.push_back(reserve(bytes(peer)));
    incoming.push_back(reserve(bytes(rank_)));
    results.push_back(reserve(bytes(peer)));
  }
  const size_t sum_offset = reserve(sizeof(float) * static_cast<size_t>(call.count()));
  char* scratch = communicator_->Scratch(scratch_bytes);
  float* sum = reinterpret_cast<float*>(scratch + sum_offset);

  Messages scatter(*this);
  Messages gather(*this);
  std::vector<const char*> summands;
  for (int peer = 0; peer < world_size(); ++peer) {
    const auto p = static_cast<size_t>(peer);
    char* message = scratch + outgoing[p];
    Reduce().quantize(rows, shard(peer), call.dtype, call.in, message);
    if (peer == rank_) {
      summands.push_back(message);
      continue;
    }
    summands.push_back(scratch + incoming[p]);
    scatter.Send(peer, message, bytes(peer));
    scatter.Receive(peer, scratch + incoming[p], bytes(rank_));
    gather.Send(peer, scratch + results[static_cast<size_t>(rank_)], bytes(rank_));
    gather.Receive(peer, scratch + results[p], bytes(peer));
  }
  scatter.Exchange(record);
  Reduce().sum_quantized(rows, shard(rank_), summands, sum + first(rank_));
  Reduce().quantize(rows, shard(rank_), DType::kFloat32, sum, scratch + results[static_cast<size_t>(rank_)]);
  gather.Exchange(record);
  for (int peer = 0; peer < world_size(); ++peer) {
    Reduce().sum_quantized(rows, shard(peer), {scratch + results[static_cast<size_t>(peer)]}, sum + first(peer));
  }
  Reduce().sum({sum}, DType::kFloat32, call.count(), call.out, call.out_dtype);
}

void GroupCommunicator::ReduceScatter(const ReduceScatterCall& call) {
  const size_t row_bytes = static_cast<size_t>(call.count) * ElementBytes(call.dtype);
  Call record = {Algorithm::kDirect, row_bytes * ranks_.size(), 0, NowNs(), 0, 0};
  char* scratch = communicator_->Scratch(static_cast<size_t>(num_others()) * RoundUp(row_bytes));
  Messages messages(*this);
  std::vector<const void*> summands;
  for (int peer = 0; peer < world_size(); ++peer) {
    const char* row = At(call.in, static_cast<size_t>(peer) * row_bytes);
    if (peer == rank_) {
      summands.push_back(row);
      continue;
    }
    messages.Send(peer, row, row_bytes);
    messages.Receive(peer, scratch, row_bytes);
    summands.push_back(scratch);
    scratch += RoundUp(row_bytes);
  }
  messages.Exchange(record);
  Reduce().sum(summands, call.dtype, call.count, call.out, call.out_dtype);
  Record(*call.channel, record);
}

void GroupCommunicator::AllGather(const AllGatherCall& call) {
  const size_t own_bytes = call.num_bytes[static_cast<size_t>(rank_)];
  Call record = {Algorithm::kDirect, own_bytes, 0, NowNs(), 0, 0};
  Messages messages(*this);
  for (int peer = 0; peer < world_size(); ++peer) {
    const auto p = static_cast<size_t>(peer);
    if (peer == rank_) continue;
    messages.Send(peer, call.in, own_bytes);
    messages.Receive(peer, call.out[p], call.num_bytes[p]);
  }
  messages.Exchange(record);
  char* own = static_cast<char*>(call.out[static_cast<size_t>(rank_)]);
  if (own != call.in) std::copy_n(static_cast<const char*>(call.in), own_bytes, own);
  Record(*call.channel, record);
}

void GroupCommunicator::Send(const PointToPointCall& call) {
  Call record = {Algorithm::kPointToPoint, call.num_bytes, call.num_bytes, NowNs(), 0, 0};
  if (call.num_bytes > 0) {
    const Outgoing message = {ranks_.at(static_cast<size_t>(call.peer)), call.data, call.num_bytes};
    communicator_->transport().Send(message, record.start_ns);
  }
  Record(*call.channel, record);
}

void GroupCommunicator::Recv(const PointToPointCall& call) {
  Call record = {Algorithm::kPointToPoint, call.num_bytes, 0, NowNs(), 0, 0};
  Messages messages(*this);
  messages.Receive(call.peer, call.data, call.num_bytes);
  messages.Exchange(record);
  Record(*call.channel, record);
}

}  // namespace headrace
