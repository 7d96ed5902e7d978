// Row and column sums of a matrix, from one read: a block takes some rows and a tile of positions
// of one group. A lane keeps its positions for all of the rows, so column sums stay in its
// registers; row sums cross the warp, four rows at a time. Where a run spans several positions or
// rows, shared memory adds them up.
#pragma once

#include "cuda/row_reduce.cuh"

namespace tk {

constexpr int kStep = 4;  // rows that a warp takes at once

constexpr int kMaxVector = 8;

// Floats of shared memory that reduce_matrix works in: one of the sums at every position, and the
// row sums of every warp (fewer rows where warps stand beside each other).
template <class Op>
constexpr int kMatrixScratch = kThreads * kMaxVector + (Op::kRows ? kMaxBlockRows * Op::kSums : 0);

// From here on a warp adds up a column's run, not a thread.
constexpr int kLongRun = 32;

// The column of a position: its channel.
__device__ inline int64_t column_of(const Task& task, int64_t position) {
  if (task.repeat > 1)
    position -= quotient(position, task.columns * task.col_run()) * (task.columns * task.col_run());
  return task.col_run() == 1 ? position : quotient(position, task.run);
}

// rows_shared holds [block_rows][warps beside each other][sums].
template <class Op>
__device__ void write_row_sums(const Task& task, const float* rows_shared, uint32_t group,
                               uint32_t row_block, uint32_t tile, float* workspace) {
  const PartialAxis axis = row_axis(task);
  const int64_t begin = int64_t{row_block} * task.block_rows;
  const int64_t end = min(begin + task.block_rows, task.rows);
  const int64_t first = quotient(begin, axis.run);
  const int count = static_cast<int>(quotient(end - 1, axis.run) - first) + 1;
  const int warps = 1 << task.width_log2;
  float* partials = workspace + int64_t{task.row_partials} * kRegion;

  for (int i = threadIdx.x; i < count * Op::kSums; i += kThreads) {
    const int64_t entry = first + i / Op::kSums;
    const int sum = i % Op::kSums;
    const int from = static_cast<int>(max(entry * axis.run, begin) - begin);
    const int to = static_cast<int>(min((entry + 1) * axis.run, end) - begin);
    float value = 0;
    for (int j = from * warps; j < to * warps; ++j) value += rows_shared[j * Op::kSums + sum];
    if (task.splits_rows()) {
      const int64_t part = int64_t{group} * task.tiles + tile;
      partials[(part * Op::kSums + sum) * axis.slots + entry + row_block] = value;
    } else {
      task.row_out[(group * axis.entries + entry) * Op::kSums + sum] = value;
    }
  }
}

// cols_shared holds one of the sums, [warps below each other][positions of the tile].
template <class Op>
__device__ void write_col_sums(const Task& task, const float* cols_shared, int vector, int sum,
                               uint32_t group, uint32_t row_block, uint32_t tile,
                               float* workspace) {
  const PartialAxis axis = col_axis(task, vector);
  const int64_t period = task.columns * axis.run;
  const int64_t begin = tile * axis.width;
  const int64_t end = min(begin + axis.width, period);  // one tile if rows are repeated
  const int64_t first = quotient(begin, axis.run);
  const int count = static_cast<int>(quotient(end - 1, axis.run) - first) + 1;
  const int warps = kWarps >> task.width_log2;
  const int width = static_cast<int>(axis.width);
  float* partials = workspace + int64_t{task.col_partials} * kRegion;

  const int lanes = axis.run < kLongRun ? 1 : kWarp;
  const int lane = threadIdx.x & (lanes - 1);
  for (int i = threadIdx.x / lanes; i < count; i += kThreads / lanes) {
    const int64_t entry = first + i;
    const int from = static_cast<int>(max(entry * axis.run, begin) - begin);
    const int to = static_cast<int>(min((entry + 1) * axis.run, end) - begin);
    float value[1] = {};
    for (int copy = 0; copy < task.repeat; ++copy) {
      for (int j = from + lane; j < to; j += lanes) {
        const float* at = cols_shared + copy * period + j;
        for (int warp = 0; warp < warps; ++warp) value[0] += at[warp * width];
      }
    }
    add_across_lanes(value, lanes);  // i is the same in the whole warp where lanes > 1
    if (lane != 0) continue;
    if (task.splits_cols()) {
      const int64_t part = int64_t{group} * task.row_blocks + row_block;
      partials[(part * Op::kSums + sum) * axis.slots + entry + tile] = value[0];
    } else {
      task.col_out[(group * axis.entries + entry) * Op::kSums + sum] = value[0];
    }
  }
}

template <class Op, class E, int kSize>
__device__ void reduce_matrix(const Op& op, const Task& task, uint32_t block, float* shared,
                              float* workspace) {
  float* cols_shared = shared;
  float* rows_shared = shared + kThreads * kMaxVector;

  const uint32_t tile = block % task.tiles;
  const uint32_t row_block = block / task.tiles % task.row_blocks;
  const uint32_t group = block / task.tiles / task.row_blocks;

  const int warp = threadIdx.x / kWarp;
  const int warps_x = 1 << task.width_log2;
  const int x = warp & (warps_x - 1);
  const int y = warp >> task.width_log2;
  const int first = (x * kWarp + threadIdx.x % kWarp) * kSize;  // of the tile's positions
  const int64_t period = task.columns * task.col_run();
  const int64_t length = period * task.repeat;
  const int64_t extent = period * task.rows;
  const int64_t position = tile * tile_width(task, kSize) + first;
  const Inputs<Op, E> inputs(task, group * extent);

  float bias[kSize] = {};
  if (kHasBias<Op> && task.c && position < length) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      bias[j] = load_element<E>(task.c, column_of(task, position + j));
    }
  }

  float cols[kSize][Op::kSums] = {};
  const int step = kStep * (kWarps >> task.width_log2);
  for (int row = y * kStep; row < static_cast<int>(task.block_rows); row += step) {
    const int64_t start = (int64_t{row_block} * task.block_rows + row) * length;
    if (start >= extent) break;
    const int64_t left = position < length ? extent - start - position : 0;
    Vector<E, kSize> vectors[kStep][kTensors<Op>];
    load_vectors<E>(vectors, (inputs + start + position).from, length, left, task.aligned,
                    kEach<Op>);
    float rows[kStep][Op::kSums] = {};
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (kHasBias<Op> && i * length >= left) break;  // zeros, but a bias would make them terms
      const Elements<Op, E, kSize> elements(op, task, vectors[i],
                                            group * extent + start + position + i * length);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        elements.add(cols[j], j, bias[j]);
        if constexpr (Op::kRows) elements.add(rows[i], j, bias[j]);
      }
    }
    if constexpr (Op::kRows) {
      if (task.row_out) {
        float sums[Op::kSums];
        add_four_rows(rows, sums);
        if (threadIdx.x % 8 == 0) {
          const int at = (row + threadIdx.x % kWarp / 8) * warps_x + x;
#pragma unroll
          for (int i = 0; i < Op::kSums; ++i) rows_shared[at * Op::kSums + i] = sums[i];
        }
      }
    }
  }

  if constexpr (Op::kRows) {
    if (task.row_out) {
      __syncthreads();
      write_row_sums<Op>(task, rows_shared, group, row_block, tile, workspace);
    }
  }
  if (!task.col_out) return;
#pragma unroll
  for (int i = 0; i < Op::kSums; ++i) {
    if (i > 0) __syncthreads();
    float* at = cols_shared + y * (kWarp * kSize * warps_x) + first;
    if constexpr (kSize == 1) {
      *at = cols[0][i];
    } else {
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        *reinterpret_cast<float4*>(at + j) =
            make_float4(cols[j][i], cols[j + 1][i], cols[j + 2][i], cols[j + 3][i]);
      }
    }
    __syncthreads();
    write_col_sums<Op>(task, cols_shared, kSize, i, group, row_block, tile, workspace);
  }
}

}  // namespace tk
