// Tasks over threads, whose results are merged in the order of the tasks.
//
// A task computes into scratch of its thread. Where its sums go on in other tasks, its merge() runs
// strictly after that of the task before it. Sums over tasks therefore have one order whatever the
// number of threads, and need no table of partial sums.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace tk {

// Calls work(data) from up to `threads` threads at once, this one among them, and waits for all.
void on_threads(int threads, void (*work)(void* data), void* data);

// A worker whose tasks have nothing to merge derives from this.
struct IndependentTasks {
  int64_t merge_index(int64_t) const { return -1; }
  void merge(int64_t) {}
};

// make_worker() returns an object for each thread, with run(task), merge_index(task) and
// merge(task). merge_index() numbers the tasks that are merged, 0, 1, 2, ...; it is negative for
// the others. Merges are mutually exclusive and in the order of their indices.
template <typename MakeWorker>
void ordered_tasks(int64_t tasks, int threads, MakeWorker make_worker) {
  using Worker = decltype(make_worker());
  struct Shared {
    int64_t tasks;
    bool alone;
    std::vector<Worker> workers;  // allocated before any thread starts, so that none can fail later
    std::atomic<int64_t> next{0}, merged{0};
    std::atomic<size_t> joined{0};
  } shared;

  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(tasks, 1)));
  shared.tasks = tasks;
  shared.alone = threads == 1;
  shared.workers.reserve(threads);
  for (int i = 0; i < threads; ++i) shared.workers.push_back(make_worker());

  auto work = [](void* data) {
    auto& all = *static_cast<Shared*>(data);
    Worker& worker = all.workers[all.joined.fetch_add(1)];
    // A thread alone counts by itself: to ask the shared counter takes as long as a tiny task.
    const auto after = [&](int64_t task) {
      return all.alone ? task + 1 : all.next.fetch_add(1, std::memory_order_relaxed);
    };
    for (int64_t task = after(-1); task < all.tasks; task = after(task)) {
      worker.run(task);
      const int64_t index = worker.merge_index(task);
      if (index < 0) continue;
      while (all.merged.load(std::memory_order_acquire) != index) std::this_thread::yield();
      worker.merge(task);
      all.merged.store(index + 1, std::memory_order_release);
    }
  };
  on_threads(threads, work, &shared);
}

}  // namespace tk
