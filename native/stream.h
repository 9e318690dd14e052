// Ops in the order they were asked for, run at once or recorded to be run again: the CPU's counterpart of a GPU's stream
// and its captured graphs, in whose words it is told.
//
// A step of decoding is some hundred ops of a few microseconds each. Asked for one by one from Python, asking takes longer
// than some of them; recorded once and launched as a whole, a step costs one call.
#ifndef HEADRACE_NATIVE_STREAM_H_
#define HEADRACE_NATIVE_STREAM_H_

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace headrace {

// Memory that recorded ops write to and read from. Buffers handed back are handed out again, to ops that come later in
// the same recording or in another one: recordings of one stream never run at the same time.
class Arena {
 public:
  void* Allocate(size_t num_bytes);
  void Free(void* buffer);
  // All that was ever allocated; none of it goes back to the system before the arena does.
  size_t num_bytes() const;

 private:
  struct Release {
    void operator()(void* memory) const;
  };
  struct Buffer {
    std::unique_ptr<void, Release> memory;
    size_t num_bytes;
    bool is_free;
  };
  mutable std::mutex mutex_;
  std::vector<Buffer> buffers_;
};

// One op as launched: a name for people, and everything it needs.
struct GraphOp {
  const char* name;
  std::function<void()> run;
};

// A recorded sequence of ops. It holds pointers: buffers of the arena (which it keeps alive), and weights and inputs of
// its owner (who must keep those).
class Graph {
 public:
  explicit Graph(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {}

  void Launch() const {
    for (const GraphOp& op : ops_) op.run();
  }
  // Launches, and adds up seconds by name.
  std::map<std::string, double> LaunchTimed() const;
  // What this graph does and then what `following` does, as one graph of the same arena.
  std::unique_ptr<Graph> Then(const Graph& following) const {
    auto both = std::make_unique<Graph>(*this);
    both->ops_.insert(both->ops_.end(), following.ops_.begin(), following.ops_.end());
    return both;
  }
  size_t num_ops() const { return ops_.size(); }
  void Add(GraphOp op) { ops_.push_back(std::move(op)); }

 private:
  std::shared_ptr<Arena> arena_;
  std::vector<GraphOp> ops_;
};

class Stream {
 public:
  // Runs the op and, during a capture, records it. An op is copied: it must be plain data, and what changes from one
  // launch to the next (lengths, block tables, token ids) must lie behind its pointers.
  template <class Op>
  void Run(const char* name, const Op& op) {
    op();
    if (graph_ != nullptr) graph_->Add({name, op});
  }

  // Unlike on a GPU, ops run while they are recorded: the step that is captured is not lost.
  void BeginCapture() {
    if (graph_ != nullptr) throw std::logic_error("this stream is being captured already");
    graph_ = std::make_unique<Graph>(arena_);
  }
  std::unique_ptr<Graph> EndCapture() {
    if (graph_ == nullptr) throw std::logic_error("this stream is not being captured");
    return std::move(graph_);
  }
  bool is_capturing() const { return graph_ != nullptr; }
  const std::shared_ptr<Arena>& arena() const { return arena_; }

 private:
  std::shared_ptr<Arena> arena_ = std::make_shared<Arena>();
  std::unique_ptr<Graph> graph_;
};

}  // namespace headrace

#endif  // HEADRACE_NATIVE_STREAM_H_
