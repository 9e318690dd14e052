// Communicators, groups of ranks and their collectives, launched on a stream or at once.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <tuple>

#include "bind.h"
#include "communicator.h"
#include "mpi_transport.h"
#include "reduce.h"
#include "shared_memory_transport.h"
#include "shared_region.h"
#include "stream.h"

namespace headrace {
namespace {

using Pairs = std::vector<std::tuple<int, int, size_t>>;

std::shared_ptr<SharedRegion> MakeRegion(int world_size, size_t ring_bytes, const Pairs& pair_ring_bytes) {
  std::vector<SharedRegion::PairBytes> pairs;
  for (const auto& [from, to, num_bytes] : pair_ring_bytes) pairs.push_back({from, to, num_bytes});
  return SharedRegion::Make(world_size, ring_bytes, pairs);
}

std::shared_ptr<Communicator> OverSharedMemory(const std::shared_ptr<SharedRegion>& region, int rank) {
  if (rank < 0 || rank >= region->world_size()) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " in a world of " +
                                std::to_string(region->world_size()));
  }
  return std::make_shared<Communicator>([&](const AbortFlag& abort) {
    return std::make_unique<SharedMemoryTransport>(region, rank, abort);
  });
}

std::shared_ptr<Communicator> OverMpi(const MpiLibrary& library, int rank, int world_size) {
  return std::make_shared<Communicator>(
      [&](const AbortFlag& abort) { return MakeMpiTransport(library, rank, world_size, abort); });
}

// On a stream an op is recorded while that is captured; without one it runs.
template <class Op>
void Launch(Stream* stream, const char* name, const Op& op) {
  if (stream == nullptr) {
    op();
  } else {
    stream->Run(name, op);
  }
}

void AllReduce(GroupCommunicator& group, Stream* stream, int channel, Algorithm algorithm, DType dtype,
               int64_t num_rows, int64_t row_size, uintptr_t in, uintptr_t out, DType out_dtype) {
  const AllReduceCall call = {&group.ledger().channel(channel), algorithm, dtype, num_rows, row_size,
                              Pointer<const void>(in), Pointer<void>(out), out_dtype};
  Launch(stream, "all_reduce", [group = &group, call] { group->AllReduce(call); });
}

void ReduceScatter(GroupCommunicator& group, Stream* stream, int channel, DType dtype, int64_t count, uintptr_t in,
                   uintptr_t out, DType out_dtype) {
  const ReduceScatterCall call = {&group.ledger().channel(channel), dtype, count, Pointer<const void>(in),
                                  Pointer<void>(out), out_dtype};
  Launch(stream, "reduce_scatter", [group = &group, call] { group->ReduceScatter(call); });
}

void AllGather(GroupCommunicator& group, Stream* stream, int channel, uintptr_t in, const std::vector<uintptr_t>& out,
               const std::vector<size_t>& num_bytes) {
  const auto world_size = static_cast<size_t>(group.world_size());
  if (out.size() != world_size || num_bytes.size() != world_size) {
    throw std::invalid_argument("an all-gather gives one address and one size for each rank");
  }
  AllGatherCall call = {&group.ledger().channel(channel), Pointer<const void>(in), {}, num_bytes};
  for (const uintptr_t address : out) call.out.push_back(Pointer<void>(address));
  Launch(stream, "all_gather", [group = &group, call] { group->AllGather(call); });
}

void CheckPeer(const GroupCommunicator& group, int peer) {
  if (peer < 0 || peer >= group.world_size() || peer == group.rank()) {
    throw std::invalid_argument("rank " + std::to_string(group.rank()) + " of " + std::to_string(group.world_size()) +
                                " has no peer " + std::to_string(peer));
  }
}

void Send(GroupCommunicator& group, Stream* stream, int channel, int to, uintptr_t data, size_t num_bytes) {
  CheckPeer(group, to);
  const PointToPointCall call = {&group.ledger().channel(channel), to, Pointer<void>(data), num_bytes};
  Launch(stream, "send", [group = &group, call] { group->Send(call); });
}

void Recv(GroupCommunicator& group, Stream* stream, int channel, int source, uintptr_t data, size_t num_bytes) {
  CheckPeer(group, source);
  const PointToPointCall call = {&group.ledger().channel(channel), source, Pointer<void>(data), num_bytes};
  Launch(stream, "recv", [group = &group, call] { group->Recv(call); });
}

// The sums that collectives make, on any instruction set: for tests.
void SumInRankOrder(Target target, const std::vector<uintptr_t>& in, DType dtype, int64_t count, uintptr_t out,
                    DType out_dtype) {
  std::vector<const void*> summands;
  for (const uintptr_t address : in) summands.push_back(Pointer<const void>(address));
  Reduce(target).sum(summands, dtype, count, Pointer<void>(out), out_dtype);
}

void SumQuantizedInRankOrder(Target target, const std::vector<uintptr_t>& in, DType dtype, int64_t num_rows,
                             int64_t row_size, uintptr_t out) {
  const GroupedRows rows = {num_rows, row_size};
  const Range all = {0, rows.num_groups()};
  std::vector<std::vector<char>> messages;
  std::vector<const char*> summands;
  for (const uintptr_t address : in) {
    messages.emplace_back(static_cast<size_t>(rows.MessageBytes(all)));
    Reduce(target).quantize(rows, all, dtype, Pointer<const void>(address), messages.back().data());
  }
  for (const std::vector<char>& message : messages) summands.push_back(message.data());
  Reduce(target).sum_quantized(rows, all, summands, Pointer<float>(out));
}

// Operation, site, phase, algorithm; count, payload and wire bytes, wait and transfer in ns.
using Row = std::tuple<Operation, std::string, Phase, Algorithm, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t>;

std::vector<Row> LedgerRows(const GroupCommunicator& group) {
  std::vector<Row> rows;
  for (const Channel* channel : group.ledger().channels()) {
    for (size_t phase = 0; phase < kNumPhases; ++phase) {
      for (size_t algorithm = 0; algorithm < kNumAlgorithms; ++algorithm) {
        const auto p = static_cast<Phase>(phase);
        const auto a = static_cast<Algorithm>(algorithm);
        const Totals& totals = channel->totals(p, a);
        if (totals.count.get() == 0) continue;
        rows.emplace_back(channel->operation, channel->site, p, a, totals.count.get(), totals.payload_bytes.get(),
                          totals.wire_bytes.get(), totals.wait_ns.get(), totals.transfer_ns.get());
      }
    }
  }
  return rows;
}

// Operation, site, phase, algorithm; payload and wire bytes; start, arrival of the last other rank (0: none) and end in ns
// of CLOCK_MONOTONIC.
using EventRow = std::tuple<Operation, std::string, Phase, Algorithm, uint64_t, uint64_t, int64_t, int64_t, int64_t>;

std::vector<EventRow> DrainTrace(GroupCommunicator& group) {
  std::vector<EventRow> rows;
  for (const Event& event : group.trace().events()) {
    const Call& call = event.call;
    rows.emplace_back(event.channel->operation, event.channel->site, event.phase, call.algorithm, call.payload_bytes,
                      call.wire_bytes, call.start_ns, call.arrival_ns, call.end_ns);
  }
  group.trace().Clear();
  return rows;
}

// RankError is looked up when it is thrown, so that the module needs nothing of Python's when it is imported.
void Translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const RankLost& lost) {
    PyErr_SetString(nb::module_::import_("headrace.errors").attr("RankError").ptr(), lost.what());
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
  }
}

void DefineEnums(nb::module_& m) {
  nb::enum_<Phase>(m, "Phase").value("PREFILL", Phase::kPrefill).value("DECODE", Phase::kDecode);
  nb::enum_<Algorithm>(m, "Algorithm")
      .value("DIRECT", Algorithm::kDirect)
      .value("TWO_SHOT", Algorithm::kTwoShot)
      .value("TWO_SHOT_INT8", Algorithm::kTwoShotInt8)
      .value("POINT_TO_POINT", Algorithm::kPointToPoint);
  nb::enum_<Operation>(m, "Operation")
      .value("ALL_REDUCE", Operation::kAllReduce)
      .value("ALL_GATHER", Operation::kAllGather)
      .value("REDUCE_SCATTER", Operation::kReduceScatter)
      .value("SEND", Operation::kSend)
      .value("RECV", Operation::kRecv);
}

void DefineGroup(nb::module_& m) {
  nb::class_<GroupCommunicator>(m, "GroupCommunicator")
      .def(nb::init<std::shared_ptr<Communicator>, std::string, std::vector<int>>(), nb::arg("communicator"),
           nb::arg("name"), nb::arg("ranks"))
      .def_prop_ro("rank", &GroupCommunicator::rank)
      .def_prop_ro("world_size", &GroupCommunicator::world_size)
      .def("set_phase", &GroupCommunicator::SetPhase, nb::arg("phase"))
      .def(
          "channel",
          [](GroupCommunicator& group, Operation operation, const std::string& site) {
            return group.ledger().Find(operation, site);
          },
          nb::arg("operation"), nb::arg("site"))
      .def("ledger_rows", &LedgerRows)
      .def(
          "start_trace", [](GroupCommunicator& group, size_t max_events) { group.trace().Start(max_events); },
          nb::arg("max_events"))
      .def("drain_trace", &DrainTrace)
      .def_prop_ro("num_dropped_events", [](GroupCommunicator& group) { return group.trace().num_dropped(); })
      .def("all_reduce", &AllReduce, nb::arg("stream").none(), nb::arg("channel"), nb::arg("algorithm"),
           nb::arg("dtype"), nb::arg("num_rows"), nb::arg("row_size"), nb::arg("in_ptr"), nb::arg("out_ptr"),
           nb::arg("out_dtype"), Unlocked())
      .def("reduce_scatter", &ReduceScatter, nb::arg("stream").none(), nb::arg("channel"), nb::arg("dtype"),
           nb::arg("count"), nb::arg("in_ptr"), nb::arg("out_ptr"), nb::arg("out_dtype"), Unlocked())
      .def("all_gather", &AllGather, nb::arg("stream").none(), nb::arg("channel"), nb::arg("in_ptr"),
           nb::arg("out_ptrs"), nb::arg("num_bytes"), Unlocked())
      .def("send", &Send, nb::arg("stream").none(), nb::arg("channel"), nb::arg("to"), nb::arg("data_ptr"),
           nb::arg("num_bytes"), Unlocked())
      .def("recv", &Recv, nb::arg("stream").none(), nb::arg("channel"), nb::arg("source"), nb::arg("data_ptr"),
           nb::arg("num_bytes"), Unlocked());
  m.def("all_reduce_algorithm", &AllReduceAlgorithm, nb::arg("payload_bytes"), nb::arg("world_size"),
        nb::arg("allows_int8"));
  m.def("sum_in_rank_order", &SumInRankOrder, nb::arg("target"), nb::arg("in_ptrs"), nb::arg("dtype"), nb::arg("count"),
        nb::arg("out_ptr"), nb::arg("out_dtype"), Unlocked());
  m.def("sum_quantized_in_rank_order", &SumQuantizedInRankOrder, nb::arg("target"), nb::arg("in_ptrs"), nb::arg("dtype"),
        nb::arg("num_rows"), nb::arg("row_size"), nb::arg("out_ptr"), Unlocked());
}

}  // namespace

void DefineCommunicator(nb::module_& m) {
  nb::register_exception_translator(&Translate);
  DefineEnums(m);
  nb::class_<SharedRegion>(m, "SharedRegion")
      .def(nb::new_(&MakeRegion), nb::arg("world_size"), nb::arg("ring_bytes"), nb::arg("pair_ring_bytes") = Pairs())
      .def_static("attach", &SharedRegion::Attach, nb::arg("fd"))
      .def_prop_ro("fd", &SharedRegion::fd)
      .def_prop_ro("world_size", &SharedRegion::world_size)
      .def_prop_ro("num_bytes", &SharedRegion::num_bytes);
  nb::class_<MpiLibrary>(m, "MpiLibrary")
      .def(nb::init<>())
      .def_rw("isend", &MpiLibrary::isend)
      .def_rw("irecv", &MpiLibrary::irecv)
      .def_rw("test", &MpiLibrary::test)
      .def_rw("iprobe", &MpiLibrary::iprobe)
      .def_rw("get_count", &MpiLibrary::get_count)
      .def_rw("cancel", &MpiLibrary::cancel)
      .def_rw("error_string", &MpiLibrary::error_string)
      .def_rw("communicator", &MpiLibrary::communicator)
      .def_rw("byte_type", &MpiLibrary::byte_type)
      .def_rw("handle_bytes", &MpiLibrary::handle_bytes)
      .def_rw("status_bytes", &MpiLibrary::status_bytes);
  nb::class_<Communicator>(m, "Communicator")
      .def_static("over_shared_memory", &OverSharedMemory, nb::arg("region"), nb::arg("rank"))
      .def_static("over_mpi", &OverMpi, nb::arg("library"), nb::arg("rank"), nb::arg("world_size"))
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("world_size", &Communicator::world_size)
      .def_prop_ro("header_bytes", &Communicator::header_bytes)
      .def("abort", &Communicator::Abort, nb::arg("reason"), Unlocked())
      .def("close", &Communicator::Close, Unlocked());
  DefineGroup(m);
}

}  // namespace headrace
