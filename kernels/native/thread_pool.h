// A pool of threads for loops of microseconds. One loop runs at a time; loops follow each other without a barrier that
// waits for a thread which has nothing to do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace specserve {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(item) once for each item in 0..items-1, on the caller and the workers, in any order; returns when all are done.
  // A worker that gets no processor delays nobody: the caller takes the items that nobody has claimed.
  template <class Body>
  void parallel_for(int items, const Body& body) {
    if (items <= 0) return;
    if (items == 1 || workers_.empty()) {
      for (int item = 0; item < items; ++item) body(item);
      return;
    }
    run(items, [](const void* context, int item) { (*static_cast<const Body*>(context))(item); }, &body);
  }

 private:
  using Call = void (*)(const void*, int);

  void run(int items, Call call, const void* context);
  bool run_one_item();
  void work();
  bool wait_for_items();

  // Written by the caller while no item is unclaimed or unfinished; read by a thread after it has claimed an item.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int items_ = 0;
  // Items that nobody has claimed yet; claiming one takes the last.
  alignas(64) std::atomic<int> unclaimed_{0};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace specserve
