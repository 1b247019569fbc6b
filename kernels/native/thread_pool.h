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

  // Sends the workers to sleep at once: no loop follows for a while.
  void rest() { resting_.store(true, std::memory_order_relaxed); }

  // body(item) once for each item in 0..items-1, on the caller and the workers; returns when all are done. Each thread
  // begins with a range of its own, from its first item on, so that it reads its part of the memory in order. Who is done
  // takes what nobody has claimed of the others' ranges: a worker that gets no processor delays nobody.
  template <class Body>
  void parallel_for(int items, const Body& body) {
    parallel_for(items, [](int) { return 0; }, [&](int, int item) { body(item); });
  }

  // The same with body(prepared, item): each thread that takes part calls prepare(its first item) before it.
  template <class Prepare, class Body>
  void parallel_for(int items, const Prepare& prepare, const Body& body) {
    if (items <= 0) return;
    if (items == 1 || threads_ == 1) {
      const auto prepared = prepare(0);
      for (int item = 0; item < items; ++item) body(prepared, item);
      return;
    }
    const auto share = [&](Claims& claims) {
      const auto prepared = prepare(claims.item());
      do body(prepared, claims.item());
      while (claims.next());
    };
    run(items, [](const void* context, Claims& claims) { (*static_cast<const decltype(share)*>(context))(claims); },
        &share);
  }

 private:
  // The items of one loop that one thread claims, one after the other. Until they are reported as done the loop goes on.
  class Claims {
   public:
    Claims(ThreadPool& pool, int thread) : pool_(pool), thread_(thread) {}
    int item() const { return item_; }
    int taken() const { return taken_; }
    // Moves on to the next item; false when none is left.
    bool next();

   private:
    ThreadPool& pool_;
    const int thread_;
    int item_ = 0, taken_ = 0, ranges_left_behind_ = 0;
  };

  using Call = void (*)(const void*, Claims&);

  // The items of one thread that nobody has claimed yet; claiming takes the first of them.
  struct alignas(64) Range {
    std::atomic<int> unclaimed{0};
  };

  int first_item(int thread) const {
    return static_cast<int>(static_cast<std::int64_t>(items_) * thread / threads());
  }
  void run(int items, Call call, const void* context);
  void take_part(int thread);
  bool any_unclaimed() const;
  void work(int thread);
  bool wait_for_items();

  const int threads_;
  // Written by the caller while no item is unclaimed or unfinished; read by a thread that has claimed an item of the loop.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int items_ = 0;
  const std::unique_ptr<Range[]> ranges_;  // one for each thread, the caller's first
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false}, resting_{false}, caller_sleeps_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
};

}  // namespace specserve
