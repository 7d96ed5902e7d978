// The squares that a thread of the tile kernels keeps while its block goes from example to example.
#pragma once

#include "cuda/conv2d_fisher/fisher_task.cuh"
#include "cuda/ptx.cuh"

namespace tk {

// Σ over examples of squared sums, in sums of sums where terms are many. The registers hold
//   short examples  squares; buffer 0 has those of the runs of examples before
//   spans           the sum of an example's spans; buffer 0 has the squares of the examples before,
//                   buffer 1 the first kSpans spans, and the next, of a very long example
// Buffers are shared memory, as many as the task says, one for each thread and sum.
template <class Memory, class Tile>
class Squares {
  static constexpr int kLaneFilters = Tile::kLaneFilters;
  static constexpr int kColumns = Tile::kLaneColumns;

  float values_[kLaneFilters][kColumns] = {};
  const bool spans_;
  const int buffers_;

  static __device__ float& buffer(int number, int i, int j) {
    auto* buffers = reinterpret_cast<float*>(dynamic_shared() + Memory::kBuffers);
    return buffers[((number * kLaneFilters + i) * kColumns + j) * kThreads + threadIdx.x];
  }

  template <class Each>
  static __device__ void for_each(const Each& each) {
#pragma unroll
    for (int i = 0; i < kLaneFilters; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) each(i, j);
    }
  }

  __device__ void move_to(int number) {
    for_each([&](int i, int j) {
      buffer(number, i, j) = __fadd_rn(buffer(number, i, j), values_[i][j]);
      values_[i][j] = 0;
    });
  }

  __device__ void take_from(int number) {
    for_each([&](int i, int j) {
      values_[i][j] = __fadd_rn(buffer(number, i, j), values_[i][j]);
      buffer(number, i, j) = 0;
    });
  }

 public:
  __device__ explicit Squares(const FisherTask& task) : spans_(task.spans), buffers_(task.buffers) {
    for (int number = 0; number < buffers_; ++number) {
      for_each([&](int i, int j) { buffer(number, i, j) = 0; });
    }
  }

  // Takes the sums of a span, or of a short example, and begins the next.
  __device__ void add(float (&sums)[kLaneFilters][kColumns]) {
    if (spans_) {
      for_each([&](int i, int j) { values_[i][j] = __fadd_rn(values_[i][j], sums[i][j]); });
    } else {
      for_each(
          [&](int i, int j) { values_[i][j] = __fmaf_rn(sums[i][j], sums[i][j], values_[i][j]); });
    }
    for_each([&](int i, int j) { sums[i][j] = 0; });
  }

  // After the add() that ended kSpans spans, but not the example.
  __device__ void end_spans() { move_to(1); }

  // After every add() that ended an example; `left` are to come.
  __device__ void end_example(int left) {
    if (spans_) {
      if (buffers_ > 1) take_from(1);
      for_each([&](int i, int j) {
        buffer(0, i, j) = __fmaf_rn(values_[i][j], values_[i][j], buffer(0, i, j));
        values_[i][j] = 0;
      });
    } else if (buffers_ > 0 && left % kRun == 0) {
      move_to(0);
    }
  }

  // The squares, once all examples have ended.
  __device__ const float (&get()) [kLaneFilters][kColumns] {
    if (buffers_ > 0) take_from(0);
    return values_;
  }
};

}  // namespace tk
