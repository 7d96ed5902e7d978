// Enough of CUDA to run the kernels of csrc/*.cu on a CPU: the threads of a block are fibers that
// take turns, so that barriers and shuffles mean what they mean on a GPU. Slow, and only a test of
// logic: races, memory spaces and launch limits do not show.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "emulated_copies.h"

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
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 blockIdx(0), threadIdx(0), blockDim(0);

namespace emulation {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 256;

// A fiber outlives its block: it runs one kernel body after the other. Only its first turn costs a
// system call.
struct Fiber {
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool running = false;
  bool waiting = false;  // for the rest of the block
  int barriers = 0;      // of the block, that it has come to
  Copies copies;
};

struct Barrier {
  unsigned arrived = 0, turn = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline unsigned arrived;  // threads of the block, at its barrier
inline Barrier warp_barriers[32];
inline std::function<void()> body;
inline std::vector<char> dynamic_shared;
inline Copies& copies() { return fibers[threadIdx.x]->copies; }
inline int skipped_barrier = -1;  // that no thread waits at, so that tests see what it is there for

inline void pass(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

inline void yield() { pass(fibers[threadIdx.x]->at, scheduler); }

inline void wait_for_block() {
  fibers[threadIdx.x]->waiting = true;
  if (++arrived == blockDim.x) {
    arrived = 0;
    for (auto& fiber : fibers) fiber->waiting = false;
  }
  while (fibers[threadIdx.x]->waiting) yield();
}

inline void wait_for_warp() {
  Barrier& barrier = warp_barriers[threadIdx.x / 32];
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == 32) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
  while (barrier.turn == turn) yield();
}

inline void run_fiber() {
  while (true) {
    body();
    fibers[threadIdx.x]->running = false;
    yield();
  }
}

inline void turn_of(unsigned thread) {
  threadIdx.x = thread;
  Fiber& fiber = *fibers[thread];
  if (fiber.stack) return pass(scheduler, fiber.at);
  fiber.stack = std::make_unique<char[]>(kStack);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, run_fiber, 0);
  if (_setjmp(scheduler) == 0) setcontext(&fiber.context);
}

// A warp runs until it waits for the others, so that one which does not wait where it should meets
// memory that they have not written, or still read. The first warp is ahead, or the last.
inline bool run_warp(unsigned warp) {
  bool ran = false;
  for (bool runs = true; runs; ran |= runs) {
    runs = false;
    for (unsigned i = 32 * warp; i < 32 * warp + 32 && i < blockDim.x; ++i) {
      if (!fibers[i]->running || fibers[i]->waiting) continue;
      turn_of(i);
      runs = true;
    }
  }
  return ran;
}

// Shared memory starts as NaN, and nothing may be written past its end.
inline void run_block(size_t shared) {
  dynamic_shared.assign(shared + kGuard, '\xff');
  while (fibers.size() < blockDim.x) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < blockDim.x; ++i) {
    fibers[i]->running = true;
    fibers[i]->barriers = 0;
    fibers[i]->copies = {};
  }
  const unsigned warps = (blockDim.x + 31) / 32;
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < warps; ++i) {
      running |= run_warp(blockIdx.x % 2 ? warps - 1 - i : i);
    }
  }
  for (size_t i = shared; i < dynamic_shared.size(); ++i) {
    if (dynamic_shared[i] != '\xff') throw std::runtime_error("written past shared memory");
  }
}

// What all lanes of the warp hand over. One barrier is enough: a lane is at most one exchange
// ahead of another, and those two have different rooms.
template <class T>
const T* exchange(const T& value) {
  static T rooms[32][2][32];
  const unsigned warp = threadIdx.x / 32;
  T* room = rooms[warp][warp_barriers[warp].turn % 2];
  room[threadIdx.x % 32] = value;
  wait_for_warp();
  return room;
}

// Where __ldg may read, if that is known. Elsewhere, or misaligned, it is a fault.
struct Range {
  const void* data;
  int64_t bytes;
};
inline std::vector<Range> readable;
inline int faults = 0;

inline bool may_read(const void* from, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(from);
  bool inside = readable.empty();
  for (const Range& range : readable) {
    const auto begin = reinterpret_cast<uintptr_t>(range.data);
    inside |= at >= begin && at + bytes <= begin + range.bytes;
  }
  if (inside && at % bytes == 0) return true;
  ++faults;
  return false;
}

}  // namespace emulation

inline void __syncthreads() {
  if (emulation::fibers[threadIdx.x]->barriers++ == emulation::skipped_barrier) return;
  emulation::wait_for_block();
}

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  return emulation::exchange(value)[threadIdx.x % 32 ^ distance];
}

template <class T>
T __ldg(const T* from) {
  return emulation::may_read(from, sizeof(T)) ? *from : T{};
}
template <class T>
void __stwb(T* to, T value) {
  *to = value;
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
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
// Threads take turns, so nothing comes in between.
template <class T>
T atomicAdd(T* to, T value) {
  return std::exchange(*to, *to + value);
}
template <class T>
T atomicMax(T* to, T value) {
  return std::exchange(*to, std::max(*to, value));
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

#include "emulated_launch.h"
