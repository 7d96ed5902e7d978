// Launches of kernels whose blocks have kThreads threads; errors become exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/task_plan.h"

namespace tk {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// `shared`: bytes that a block has beside what the kernel declares.
template <class... Parameters, class... Arguments>
void launch_with_shared(const char* name, cudaStream_t stream, int64_t blocks, int shared,
                        void (*kernel)(Parameters...), const Arguments&... arguments) {
  constexpr int kUnasked = 48 << 10;  // what a launch may have without asking
  if (shared > kUnasked) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
  check(cudaGetLastError(), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, cudaStream_t stream, int64_t blocks, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  launch_with_shared(name, stream, blocks, 0, kernel, arguments...);
}

}  // namespace tk
