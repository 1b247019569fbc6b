#include "thread_pool.h"

#include <chrono>

namespace specserve {
namespace {

// How long a worker looks for the next loop before it sleeps: longer than the gap between two calls of one step, far
// shorter than a step, because another process may be waiting for the processor.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPausesBetweenClocks = 32;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Calls `ready` until it is true or the spin is over; returns what it said last.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kPausesBetweenClocks; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  return ready();
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads), ranges_(std::make_unique<Range[]>(threads)) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run(int items, Call call, const void* context) {
  call_ = call;
  context_ = context;
  items_ = items;
  unfinished_.store(items, std::memory_order_relaxed);
  resting_.store(false, std::memory_order_relaxed);
  // Sequentially consistent, like the other side in wait_for_items: either a worker sees the items or it is seen asleep.
  for (int thread = 0; thread < threads_; ++thread)
    ranges_[thread].unclaimed.store(first_item(thread + 1) - first_item(thread));
  if (sleepers_.load() > 0) {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
  take_part(0);
  const auto finished = [this] { return unfinished_.load() == 0; };
  if (spin_until(finished)) return;
  // Another process has a worker's processor: asleep, the caller leaves its own to the worker.
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  caller_sleeps_.store(true);
  finished_.wait(lock, finished);
  caller_sleeps_.store(false);
}

// Runs what the thread can claim of the loop.
void ThreadPool::take_part(int thread) {
  Claims claims(*this, thread);
  if (!claims.next()) return;
  call_(context_, claims);
  // Sequentially consistent, like the other side in run(): the caller sees that all is done or is seen asleep.
  if (unfinished_.fetch_sub(claims.taken()) == claims.taken() && caller_sleeps_.load()) {
    const std::lock_guard<std::mutex> lock(sleep_mutex_);
    finished_.notify_one();
  }
}

// The thread's own range, then the others'.
bool ThreadPool::Claims::next() {
  for (; ranges_left_behind_ < pool_.threads_; ++ranges_left_behind_) {
    const int range = (thread_ + ranges_left_behind_) % pool_.threads_;
    std::atomic<int>& unclaimed = pool_.ranges_[range].unclaimed;
    int left = unclaimed.load(std::memory_order_relaxed);
    while (left > 0) {
      if (!unclaimed.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
      item_ = pool_.first_item(range + 1) - left;
      ++taken_;
      return true;
    }
  }
  return false;
}

bool ThreadPool::any_unclaimed() const {
  for (int thread = 0; thread < threads_; ++thread)
    if (ranges_[thread].unclaimed.load() > 0) return true;
  return false;
}

void ThreadPool::work(int thread) {
  while (wait_for_items()) take_part(thread);
}

// False when the pool is being destroyed.
bool ThreadPool::wait_for_items() {
  const auto ready = [this] { return any_unclaimed() || stopping_.load(); };
  spin_until([&] { return ready() || resting_.load(std::memory_order_relaxed); });
  if (!ready()) {
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, ready);
    sleepers_.fetch_sub(1);
  }
  return !stopping_.load();
}

}  // namespace specserve
