// Sums of contiguous rows: a group of 1 to 256 lanes sums a row, or a segment of a long one.
#pragma once

#include "cuda/operands.cuh"
#include "cuda/task_plan.h"
#include "cuda/warp_reduce.cuh"

namespace tk {

// 64-bit division is a long subroutine on a GPU; nearly all operands fit in 32 bits.
__device__ inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}
__device__ inline int32_t quotient(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// Floats of shared memory that reduce_rows works in.
template <class Op>
constexpr int kRowScratch = 2 * kWarps * Op::kSums;

// Vectors of each tensor that a lane has in flight.
constexpr int kInFlight = 4;

// Adds the terms of elements [begin, begin + n) that belong to `lane` of `lanes` to `total`.
// First the whole vectors, then what stands before the first and after the last.
template <class Op, class E>
__device__ void add_range(const Op& op, const Task& task, int64_t begin, int n, int lane, int lanes,
                          float bias, float (&total)[Op::kSums]) {
  constexpr int kSize = kVectorSize<E>;
  const Inputs<Op, E> inputs(task, begin);
  int head = n;
  int body = 0;
  if (task.vectors) {
    head = min(n, static_cast<int>(-begin & (kSize - 1)));
    body = (n - head) & -kSize;
  }

  float sums[Op::kSums] = {};
  const int step = lanes * kSize;
#pragma unroll 1
  for (int at = lane * kSize; at < body; at += kInFlight * step) {
    Vector<E, kSize> vectors[kInFlight][kTensors<Op>];
    load_vectors<E>(vectors, (inputs + head + at).from, step, body - at, task.aligned, kEach<Op>);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (at + i * step >= body) break;  // zeros, but a bias would turn them into terms
      const Elements<Op, E, kSize> elements(op, task, vectors[i], begin + head + at + i * step);
#pragma unroll
      for (int j = 0; j < kSize; ++j) elements.add(sums, j, bias);
    }
  }
#pragma unroll 1
  for (int i = lane; i < n - body; i += lanes) {
    const int at = i < head ? i : i + body;
    Vector<E, 1> element[1][kTensors<Op>];
    load_vectors<E>(element, (inputs + at).from, 1, 1, true, kEach<Op>);
    Elements<Op, E, 1>(op, task, element[0], begin + at).add(sums, 0, bias);
  }
#pragma unroll
  for (int i = 0; i < Op::kSums; ++i) total[i] += sums[i];
}

template <class Op>
__device__ void write_row(const Task& task, float* partials, uint32_t tile, int64_t row, int sum,
                          float value) {
  if (task.tiles > 1) {
    partials[(int64_t{tile} * Op::kSums + sum) * task.rows + row] = value;
  } else {
    if (task.row_out) task.row_out[row * Op::kSums + sum] = value;
    if (task.col_out) task.col_out[row * Op::kSums + sum] = value;
  }
}

template <class Op, class E>
__device__ void reduce_rows(const Op& op, const Task& task, uint32_t block, float* shared,
                            float* workspace) {
  constexpr int kChunk = kChunkBytes / int{sizeof(typename E::Raw)};
  float* partials = workspace + int64_t{task.row_partials} * kRegion;

  const uint32_t tile = block % task.tiles;
  const int64_t first_row = int64_t{block / task.tiles} * task.block_rows;
  const int64_t end_row = min(first_row + task.block_rows, task.rows);
  int64_t begin = 0;
  int64_t end = task.columns;
  if (task.tiles > 1) {
    const int64_t chunks = divide_up(task.columns, kChunk);
    const int64_t segment = divide_up(chunks, task.tiles) * kChunk;
    begin = min(tile * segment, end);
    end = min(begin + segment, end);
  }

  uint32_t first_channel = 0;
  if (kHasBias<Op>) first_channel = first_row - quotient(first_row, task.run) * task.run;

  const int lanes = 1 << task.width_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int lane_group = threadIdx.x >> task.width_log2;
  const int lane_groups = kThreads >> task.width_log2;
  int buffer = 0;  // two in turn, so that one barrier per pass is enough
#pragma unroll 1
  for (int64_t pass = first_row; pass < end_row; pass += lane_groups, buffer ^= 1) {
    const int64_t row = pass + lane_group;
    float sums[Op::kSums] = {};
    if (row < end_row) {
      float bias = 0;
      if (kHasBias<Op> && task.c) {
        const uint32_t channel = first_channel + static_cast<uint32_t>(row - first_row);
        bias = load_element<E>(task.c, channel % static_cast<uint32_t>(task.run));
      }
      // A sum of sums of chunks: a thread's serial sums stay short in the longest rows.
#pragma unroll 1
      for (int64_t at = begin; at < end; at += kChunk) {
        const int n = static_cast<int>(min(int64_t{kChunk}, end - at));
        add_range<Op, E>(op, task, row * task.columns + at, n, lane, lanes, bias, sums);
      }
    }
    add_across_lanes(sums, min(lanes, kWarp));
    if (lanes <= kWarp) {
      if (lane == 0 && row < end_row) {
#pragma unroll
        for (int i = 0; i < Op::kSums; ++i) write_row<Op>(task, partials, tile, row, i, sums[i]);
      }
      continue;
    }
    float* warp_sums = shared + buffer * kWarps * Op::kSums;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < Op::kSums; ++i) {
        warp_sums[threadIdx.x / kWarp * Op::kSums + i] = sums[i];
      }
    }
    __syncthreads();
    if (lane < Op::kSums && row < end_row) {
      const int warps = lanes / kWarp;
      float sum = 0;
      for (int i = 0; i < warps; ++i) sum += warp_sums[(lane_group * warps + i) * Op::kSums + lane];
      write_row<Op>(task, partials, tile, row, lane, sum);
    }
  }
}

}  // namespace tk
