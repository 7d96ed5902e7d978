// The kernels that run a table of tasks of one op. The op is a struct:
//   kSums, kRows (it can ask a matrix for row sums), kOperand (its third operand), and
//   add(sums, a, b, c), which adds the terms of one element pair and the third operand with
//   explicitly rounded intrinsics, so that no compiler can fuse them differently in two of the
//   loops. An op that takes random signs has signs(stream, element) too.
#pragma once

#include "cuda/matrix_reduce.cuh"
#include "cuda/ptx.cuh"

namespace tk {

template <class Op, bool kMatrix, class E>
__device__ void run_task(const Op& op, const Task& task, uint32_t block, float* shared,
                         float* workspace) {
  if constexpr (kMatrix) {
    if (task.is_matrix) {
      if (task.vectors) {
        reduce_matrix<Op, E, kVectorSize<E>>(op, task, block, shared, workspace);
      } else {
        reduce_matrix<Op, E, 1>(op, task, block, shared, workspace);
      }
      return;
    }
  }
  reduce_rows<Op, E>(op, task, block, shared, workspace);
}

// Blocks of a multiprocessor at once, which bounds a kernel's registers. Two that read three
// tensors have as many loads in flight as three that read two; random signs cost registers too.
template <class Op, bool kMatrix>
constexpr int kBlocks =
    kMatrix || Op::kOperand == Operand::tensor || Op::kOperand == Operand::random_sign ? 2 : 3;

// The only pass over the inputs. A list without matrix tasks gets a kernel without them: theirs
// needs so many registers that fewer threads of it fit on a GPU.
template <class Op, bool kMatrix, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks<Op, kMatrix>)
    stream_kernel(const __grid_constant__ TaskTable<kCapacity> table, float* workspace, Op op) {
  let_next_kernel_begin();
  constexpr int kScratch = kMatrix ? kMatrixScratch<Op> : kRowScratch<Op>;
  alignas(16) __shared__ float shared[kScratch];
  const Task& task = table.find(blockIdx.x, &Task::first_block);
  const uint32_t block = blockIdx.x - task.first_block;
  with_element(static_cast<DType>(task.dtype), [&](auto element) {
    run_task<Op, kMatrix, decltype(element)>(op, task, block, shared, workspace);
  });
}

// The second stage: adds the parts of every result that came in parts, always in one order. It is
// launched early, behind stream_kernel or the kernels of conv2d_fisher.
template <class Op, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ TaskTable<kCapacity> table, const float* workspace) {
  __shared__ float shared[kThreads];
  const Task& task = table.find(blockIdx.x, &Task::first_finish);
  int64_t block = blockIdx.x - task.first_finish;

  PartialAxis axis = row_axis(task);
  const float* partials = workspace + int64_t{task.row_partials} * kRegion;
  float* out = task.row_out;
  float* copy = task.is_matrix ? nullptr : task.col_out;
  const int64_t row_blocks = task.splits_rows() && (out || copy) ? axis.blocks(Op::kSums) : 0;
  if (block >= row_blocks) {
    block -= row_blocks;
    axis = col_axis(task, vector_size(task));
    partials = workspace + int64_t{task.col_partials} * kRegion;
    out = task.col_out;
    copy = nullptr;
  }

  const int threads_log2 = axis.threads_log2();
  const int results = kThreads >> threads_log2;
  const int x = threadIdx.x & (results - 1);
  const int y = threadIdx.x / results;
  const int64_t index = block * results + x;
  const bool present = index < axis.groups * axis.entries * Op::kSums;
  const int64_t plane = quotient(index, axis.entries);  // group and sum
  const int64_t entry = index - plane * axis.entries;
  const int64_t group = plane / Op::kSums;
  const int sum = static_cast<int>(plane - group * Op::kSums);

  wait_for_last_kernel();
  float value = 0;
  if (present) {
    const int64_t from = entry + quotient(entry * axis.run, axis.width);
    const int64_t to = entry + quotient(entry * axis.run + axis.run - 1, axis.width);
    for (int64_t slot = from; slot <= to; ++slot) {
      const float* at = partials + (group * axis.parts * Op::kSums + sum) * axis.slots + slot;
#pragma unroll 8
      for (int64_t part = y; part < axis.parts; part += int64_t{1} << threads_log2) {
        value += at[part * Op::kSums * axis.slots];
      }
    }
  }
  shared[threadIdx.x] = value;
  for (int distance = kThreads / 2; distance >= results; distance /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < distance) {
      shared[threadIdx.x] += shared[threadIdx.x + distance];
    }
  }
  if (y == 0 && present) {
    const int64_t to = (group * axis.entries + entry) * Op::kSums + sum;
    if (out) out[to] = shared[x];
    if (copy) copy[to] = shared[x];
  }
}

}  // namespace tk
