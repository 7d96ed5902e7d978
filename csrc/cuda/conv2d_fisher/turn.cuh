// Turns x or dy of some examples for the pipelined kernel: channels, or filters, of a group come to
// lie side by side and begin at a multiple of four bytes, of 16 where they are many. A block takes
// 64 of them at 64 pixels.
#pragma once

#include "cuda/conv2d_fisher/fisher_task.cuh"
#include "cuda/launch.cuh"

namespace tk {

constexpr int kTurnSide = 64;

struct TurnTask {
  FisherSide from;
  FisherSide to;  // its rows are as many as they lie apart: what is added is zero
  int64_t groups;
  int64_t rows;    // of a group, that are there
  int64_t padded;  // and that are written
  int64_t pixels;
  uint32_t row_tiles;
  uint32_t pixel_tiles;
};

template <class Raw>
__global__ void __launch_bounds__(kThreads) turn_kernel(const __grid_constant__ TurnTask task) {
  constexpr int kPerWord = 4 / int{sizeof(Raw)};
  // An odd number of words to a pixel: rows of one pixel, or pixels of one row, differ in the bank.
  constexpr int kPitch = kTurnSide + kPerWord;
  alignas(16) __shared__ Raw tile[kTurnSide * kPitch];

  const uint32_t pixel_blocks = blockIdx.x / task.row_tiles;
  const uint32_t outer = pixel_blocks / task.pixel_tiles;
  const int64_t example = outer / static_cast<uint32_t>(task.groups);
  const int64_t group = outer - example * task.groups;
  const int row = static_cast<int>(blockIdx.x - pixel_blocks * task.row_tiles) * kTurnSide;
  const int pixel = static_cast<int>(pixel_blocks - outer * task.pixel_tiles) * kTurnSide;
  const int rows = static_cast<int>(task.rows) - row;
  const int pixels = static_cast<int>(task.pixels) - pixel;
  const auto* from = static_cast<const Raw*>(task.from.data) + example * task.from.example +
                     group * task.from.group + row * task.from.row + pixel * task.from.pixel;
  auto* to = static_cast<Raw*>(const_cast<void*>(task.to.data)) + example * task.to.example +
             group * task.to.group + row + pixel * task.to.pixel;

  const bool rows_inside = task.from.row == 1;
  const auto row_step = static_cast<int>(task.from.row);
  const auto pixel_step = static_cast<int>(task.from.pixel);
#pragma unroll 4
  for (int i = threadIdx.x; i < kTurnSide * kTurnSide; i += kThreads) {
    const int inner = i % kTurnSide;
    const int r = rows_inside ? inner : i / kTurnSide;
    const int p = rows_inside ? i / kTurnSide : inner;
    Raw value = 0;
    if (r < rows && p < pixels) value = __ldg(from + r * row_step + p * pixel_step);
    tile[p * kPitch + r] = value;
  }
  __syncthreads();
  const auto to_step = static_cast<int>(task.to.pixel);
  constexpr int kWords = kTurnSide / kPerWord;
#pragma unroll 4
  for (int i = threadIdx.x; i < kTurnSide * kWords; i += kThreads) {
    const int r = i % kWords * kPerWord;
    const int p = i / kWords;
    if (p >= pixels || r >= static_cast<int>(task.padded) - row) continue;
    *reinterpret_cast<uint32_t*>(to + p * to_step + r) =
        *reinterpret_cast<const uint32_t*>(tile + p * kPitch + r);
  }
}

inline void turn(const char* name, cudaStream_t stream, int64_t element, const TurnTask& task,
                 int64_t examples) {
  const int64_t blocks = examples * task.groups * task.row_tiles * task.pixel_tiles;
  if (element == 2) {
    launch(name, stream, blocks, turn_kernel<uint16_t>, task);
  } else {
    launch(name, stream, blocks, turn_kernel<uint32_t>, task);
  }
}

}  // namespace tk
