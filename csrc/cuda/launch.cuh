// Launches of kernels whose blocks have kThreads threads; errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <map>
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

// Bytes of shared memory that a block may have at most on the current device: 99 KiB on sm_86.
inline int shared_limit(const char* name) {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  return bytes;
}

// Whether a kernel's code on the current device has instructions of sm_90, by which it waits for
// the one before it. That for sm_80 has none, also where a driver translates it for a later GPU.
inline bool waits_by_itself(const char* name, const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [at, is_new] = known.try_emplace({device, kernel}, false);
  if (is_new) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, kernel), name);
    at->second = attributes.ptxVersion >= 90;
  }
  return at->second;
}

template <class... Parameters, class... Arguments>
void launch_as(const char* name, cudaStream_t stream, int64_t blocks, int shared_bytes, bool early,
               void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
  check(cudaGetLastError(), name);
}

template <class... Parameters, class... Arguments>
void launch_with_shared(const char* name, cudaStream_t stream, int64_t blocks, DynamicShared shared,
                        void (*kernel)(Parameters...), const Arguments&... arguments) {
  allow_shared(name, reinterpret_cast<const void*>(kernel), shared.most);
  launch_as(name, stream, blocks, shared.bytes, false, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, cudaStream_t stream, int64_t blocks, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  launch_as(name, stream, blocks, 0, false, kernel, arguments...);
}

// Of a kernel that calls wait_for_last_kernel(), after one that calls let_next_kernel_begin(): it
// need not wait until the GPU has gone idle and told the host's queue so.
template <class... Parameters, class... Arguments>
void launch_early(const char* name, cudaStream_t stream, int64_t blocks,
                  void (*kernel)(Parameters...), const Arguments&... arguments) {
  const bool early = waits_by_itself(name, reinterpret_cast<const void*>(kernel));
  launch_as(name, stream, blocks, 0, early, kernel, arguments...);
}

}  // namespace tk
