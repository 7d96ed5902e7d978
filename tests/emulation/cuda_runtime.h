// Enough of CUDA to run the kernels of csrc/*.cu on a CPU: the threads of a block are fibers that
// take turns, so that barriers and shuffles mean what they mean on a GPU. Slow, and only a test of
// logic: races, memory spaces and launch limits do not show.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 blockIdx(0), threadIdx(0), blockDim(0);

namespace emulation {

constexpr size_t kStack = 128 << 10;

struct Barrier {
  unsigned waiting = 0, turn = 0;
};

inline std::vector<ucontext_t> fibers;
inline std::vector<char> stacks, finished;
inline ucontext_t scheduler;
inline Barrier block_barrier;
inline Barrier warp_barriers[32];
inline uint32_t lanes[1024];
inline std::function<void()> body;

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned turn = barrier.turn, self = threadIdx.x;
  if (++barrier.waiting == threads) {
    barrier.waiting = 0;
    ++barrier.turn;
  }
  while (barrier.turn == turn) swapcontext(&fibers[self], &scheduler);
}

inline void run_fiber() {
  const unsigned self = threadIdx.x;
  body();
  finished[self] = 1;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  stacks.resize(threads * kStack);
  finished.assign(threads, 0);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    fibers[i].uc_stack.ss_size = kStack;
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], run_fiber, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (finished[i]) continue;
      running = true;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i]);
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  emulation::Barrier& barrier = emulation::warp_barriers[threadIdx.x / 32];
  std::memcpy(&emulation::lanes[threadIdx.x], &value, 4);
  emulation::wait(barrier, 32);
  std::memcpy(&value, &emulation::lanes[threadIdx.x ^ distance], 4);
  emulation::wait(barrier, 32);
  return value;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  blockDim = config->blockDim;
  emulation::body = [&] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
    emulation::run_block(blockDim.x);
  }
  return cudaSuccess;
}
