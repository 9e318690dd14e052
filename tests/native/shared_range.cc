// Ends with 0 if a SharedRange gives out every item exactly once. tests/test_native_shared_range.py compiles and runs
// it.
#include "shared_range.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace headrace {
namespace {

void Check(bool is_right, const char* what) {
  if (is_right) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Of three parts only one takes: as if the others had lost their cores.
void CheckOneTakesAll() {
  constexpr int64_t kBegin = 5, kEnd = 905, kMost = 7;
  SharedRange shared({kBegin, kEnd}, 3);
  std::vector<int> times(kEnd);
  const Range own = Part({kBegin, kEnd}, 1, 3);
  int64_t num_taken = 0;
  for (Range piece; Size(piece = shared.Take(1, kMost)) > 0;) {
    Check(Size(piece) <= kMost, "a piece is not larger than wanted");
    Check(num_taken >= Size(own) || piece.begin == own.begin + num_taken, "a part's own items come first, in order");
    num_taken += Size(piece);
    for (int64_t i = piece.begin; i < piece.end; ++i) ++times[i];
  }
  for (int64_t i = 0; i < kEnd; ++i) Check(times[i] == (i >= kBegin), "one part takes all items once");
  Check(Size(shared.Take(0, kMost)) == 0, "nothing is left for the others");
}

void CheckMorePartsThanItems() {
  SharedRange shared({0, 2}, 5);
  int64_t num_items = 0;
  for (int part = 4; part >= 0; --part) num_items += Size(shared.Take(part, 1));
  Check(num_items == 2, "two items are given out to five parts");
}

// Threads that take as fast as they can steal from each other all the time.
void CheckThreads() {
  constexpr int kThreads = 4;
  constexpr int64_t kItems = 301;
  for (int round = 0; round < 500; ++round) {
    SharedRange shared({0, kItems}, kThreads);
    std::vector<std::atomic<int>> times(kItems);
    std::vector<std::thread> threads;
    for (int part = 0; part < kThreads; ++part) {
      threads.emplace_back([&, part] {
        for (Range piece; Size(piece = shared.Take(part, 1 + round % 3)) > 0;) {
          for (int64_t i = piece.begin; i < piece.end; ++i) times[i].fetch_add(1);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::atomic<int>& count : times) Check(count.load() == 1, "threads take each item once");
  }
}

}  // namespace
}  // namespace headrace

int main() {
  headrace::CheckOneTakesAll();
  headrace::CheckMorePartsThanItems();
  headrace::CheckThreads();
}
