// Tasks over threads, results committed in task order.
//
// A task computes into scratch of its thread; its commit() then runs strictly after that of the
// task before it. Sums over tasks therefore have one order whatever the number of threads, and
// need no table of partials.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace tk {

// worker(thread) returns a callable object with run(task) and commit(task); commits are mutually
// exclusive and in order. Threads are started per call: they cost tens of microseconds, so a
// caller asks for more than one only when there is more work than that, and nothing survives a
// fork() or competes with PyTorch's own pool between calls.
template <typename MakeWorker>
void ordered_tasks(int64_t tasks, int threads, MakeWorker make_worker) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> committed{0};
  auto work = [&](auto&& worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      worker.run(task);
      while (committed.load(std::memory_order_acquire) != task) std::this_thread::yield();
      worker.commit(task);
      committed.store(task + 1, std::memory_order_release);
    }
  };

  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(tasks, 1)));
  using Worker = decltype(make_worker());
  std::vector<Worker> workers;  // allocated before any thread starts, so that none can fail later
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.push_back(make_worker());
  std::vector<std::thread> pool;
  pool.reserve(threads);
  try {
    for (int i = 1; i < threads; ++i) pool.emplace_back([&, i] { work(workers[i]); });
  } catch (const std::exception&) {
    // The system has no thread to give: those that started, and this one, do the work.
  }
  work(workers[0]);
  for (auto& thread : pool) thread.join();
}

}  // namespace tk
