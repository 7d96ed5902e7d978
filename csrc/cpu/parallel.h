// Tasks over threads, results committed in task order.
//
// A task computes into scratch of its thread; where its sums go on in other tasks, its commit()
// runs strictly after that of the task before it. Sums over tasks therefore have one order whatever
// the number of threads, and need no table of partials.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tk {

// Calls work(data) from up to `threads` threads at once, this one among them, and waits for all.
void on_threads(int threads, void (*work)(void* data), void* data);

// make_worker() returns an object for each thread, with run(task), turn(task) and commit(task).
// turn() numbers those tasks that commit, 0, 1, 2, ...; for others it is negative. Commits are
// mutually exclusive and in the order of their turns.
template <typename MakeWorker>
void ordered_tasks(int64_t tasks, int threads, MakeWorker make_worker) {
  using Worker = decltype(make_worker());
  struct Shared {
    int64_t tasks;
    std::vector<Worker> workers;  // allocated before any thread starts, so that none can fail later
    std::atomic<int64_t> next{0}, committed{0};
    std::atomic<size_t> joined{0};
  } shared;

  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(tasks, 1)));
  shared.tasks = tasks;
  shared.workers.reserve(threads);
  for (int i = 0; i < threads; ++i) shared.workers.push_back(make_worker());

  auto work = [](void* data) {
    auto& all = *static_cast<Shared*>(data);
    Worker& worker = all.workers[all.joined.fetch_add(1)];
    for (int64_t task; (task = all.next.fetch_add(1, std::memory_order_relaxed)) < all.tasks;) {
      worker.run(task);
      const int64_t turn = worker.turn(task);
      if (turn < 0) continue;
      while (all.committed.load(std::memory_order_acquire) != turn) std::this_thread::yield();
      worker.commit(task);
      all.committed.store(turn + 1, std::memory_order_release);
    }
  };
  on_threads(threads, work, &shared);
}

}  // namespace tk
