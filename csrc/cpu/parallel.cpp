#include "cpu/parallel.h"

#include <dlfcn.h>

#include <exception>

namespace tk {
namespace {

// The entry to an OpenMP runtime that GCC's own compiled code uses; LLVM's and Intel's have it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// PyTorch's pool of threads, if it is an OpenMP one: it loads its runtime for all to see. Linking
// to a runtime here would start a second pool, and starting threads here instead took 1.1 to 1.2
// times as long for the rows of ResNet-50, on as many cores as threads.
GompParallel openmp() {
  static const auto function = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return function;
}

}  // namespace

void on_threads(int threads, void (*work)(void*), void* data) {
  if (threads == 1) return work(data);
  if (openmp()) return openmp()(work, data, threads, 0);
  std::vector<std::thread> pool;
  pool.reserve(threads);
  try {
    for (int i = 1; i < threads; ++i) pool.emplace_back(work, data);
  } catch (const std::exception&) {
    // The system has no thread to give: those that started, and this one, do the work.
  }
  work(data);
  for (auto& thread : pool) thread.join();
}

}  // namespace tk
