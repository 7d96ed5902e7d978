// Launches of kernels whose blocks have kThreads threads; errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/task_plan.h"

namespace tk {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Bytes of shared memory that a block has beside what its kernel declares: in this launch, and at
// most in any of its launches.
struct DynamicShared {
  int bytes;
  int most;
};

// Lets a kernel's launches on the current device have up to `most` bytes, once for all of them. If
// every launch set what it needs, a thread with less could come between the setting and the launch
// of another with more.
inline void allow_shared(const char* name, const void* kernel, int most) {
  constexpr int kAlwaysAllowed = 48 << 10;
  if (most <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  allowed.insert({device, kernel});
}

template <class... Parameters, class... Arguments>
void launch_with_shared(const char* name, cudaStream_t stream, int64_t blocks, DynamicShared shared,
                        void (*kernel)(Parameters...), const Arguments&... arguments) {
  allow_shared(name, reinterpret_cast<const void*>(kernel), shared.most);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared.bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
  check(cudaGetLastError(), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, cudaStream_t stream, int64_t blocks, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  launch_with_shared(name, stream, blocks, {0, 0}, kernel, arguments...);
}

}  // namespace tk
