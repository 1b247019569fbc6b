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

  int threads() const { return threads_; }

  // body(item) once for each item in 0..items-1, on the caller and the workers; returns when all are done. Each thread
  // begins with a range of its own, from its first item on, so that it reads its part of the memory in order. Who is done
  // takes what nobody has claimed of the others' ranges: a worker that gets no processor delays nobody.
  template <class Body>
  void parallel_for(int items, const Body& body) {
    if (items <= 0) return;
    if (items == 1 || threads_ == 1) {
      for (int item = 0; item < items; ++item) body(item);
      return;
    }
    run(items, [](const void* context, int item) { (*static_cast<const Body*>(context))(item); }, &body);
  }

 private:
  using Call = void (*)(const void*, int);

  // The items of one thread that nobody has claimed yet; claiming takes the first of them.
  struct alignas(64) Range {
    std::atomic<int> unclaimed{0};
  };

  int first_item(int thread) const {
    return static_cast<int>(static_cast<std::int64_t>(items_) * thread / threads());
  }
  void run(int items, Call call, const void* context);
  void run_items(int thread);
  bool run_one_item(int range);
  bool any_unclaimed() const;
  void work(int thread);
  bool wait_for_items();

  const int threads_;
  // Written by the caller while no item is unclaimed or unfinished; read by a thread after it has claimed an item.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int items_ = 0;
  const std::unique_ptr<Range[]> ranges_;  // one for each thread, the caller's first
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace specserve
