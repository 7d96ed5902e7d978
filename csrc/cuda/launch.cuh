// Kernels and launches for a list of tasks of one op. The op is a struct:
//   kSums, kRows (it can ask a grid for row sums), kThird (what it reads beside pairs), and
//   add(sums, a, b, c), which adds the terms of one element pair and the third operand with
//   explicitly rounded intrinsics, so that no compiler can fuse them differently in two of the
//   loops. An op that takes random signs has signs(stream, element) too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/grid_sums.cuh"

namespace tk {

template <class Op, bool kGrid, class E>
__device__ void run_task(const Op& op, const Task& task, uint32_t block, float* shared,
                         float* workspace) {
  if constexpr (kGrid) {
    if (task.grid) {
      if (task.vectors) {
        sum_grid<Op, E, kVectorSize<E>>(op, task, block, shared, workspace);
      } else {
        sum_grid<Op, E, 1>(op, task, block, shared, workspace);
      }
      return;
    }
  }
  sum_rows<Op, E>(op, task, block, shared, workspace);
}

// Blocks of a multiprocessor at once, which bounds a kernel's registers. Two that read three
// tensors have as many loads in flight as three that read two; random signs cost registers too.
template <class Op, bool kGrid>
constexpr int kBlocks = kGrid || Op::kThird == Third::tensor || Op::kThird == Third::sign ? 2 : 3;

// The only pass over the inputs. A list without grid tasks gets a kernel without them: theirs
// needs so many registers that fewer threads of it fit on a GPU.
template <class Op, bool kGrid, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks<Op, kGrid>)
    stream_kernel(const __grid_constant__ TaskTable<kCapacity> table, float* workspace, Op op) {
  constexpr int kScratch = kGrid ? kGridScratch<Op> : kRowScratch<Op>;
  alignas(16) __shared__ float shared[kScratch];
  const Task& task = table.find(blockIdx.x, &Task::first_block);
  const uint32_t block = blockIdx.x - task.first_block;
  switch (static_cast<DType>(task.dtype)) {
    case DType::f32:
      return run_task<Op, kGrid, Element<DType::f32>>(op, task, block, shared, workspace);
    case DType::f16:
      return run_task<Op, kGrid, Element<DType::f16>>(op, task, block, shared, workspace);
    default:
      return run_task<Op, kGrid, Element<DType::bf16>>(op, task, block, shared, workspace);
  }
}

// The second stage: adds the parts of every result that came in parts, always in one order.
template <class Op, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ TaskTable<kCapacity> table, const float* workspace) {
  __shared__ float shared[kThreads];
  const Task& task = table.find(blockIdx.x, &Task::first_finish);
  int64_t block = blockIdx.x - task.first_finish;

  PartialAxis axis = row_axis(task);
  const float* partials = workspace + int64_t{task.row_partials} * kRegion;
  float* out = task.row_out;
  float* copy = task.grid ? nullptr : task.col_out;
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

// The tasks of one launch, and the workspace they need.
struct Batch {
  int64_t end = 0;  // one past its last task
  int64_t blocks = 0;
  int64_t finish_blocks = 0;
  int64_t floats = 0;
  bool grid = false;
};

// Lists whose partial sums exceed this are cut: the parts share the workspace one after another.
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kMaxBlocks = INT32_MAX;

inline int64_t whole_regions(int64_t floats) { return divide_up(floats, kRegion) * kRegion; }

// Takes tasks from `begin` on, and fills in where their blocks and partial sums lie.
template <class Op>
Batch next_batch(std::vector<Task>& tasks, int64_t begin) {
  Batch batch;
  const int64_t most = std::min<int64_t>(tasks.size(), begin + kLongTable);
  for (batch.end = begin; batch.end < most; ++batch.end) {
    Task& task = tasks[batch.end];
    int64_t row_floats = 0;
    int64_t col_floats = 0;
    int64_t finish_blocks = 0;
    if (task.splits_rows() && (task.row_out || !task.grid)) {
      row_floats = whole_regions(row_axis(task).floats(Op::kSums));
      finish_blocks += row_axis(task).blocks(Op::kSums);
    }
    if (task.splits_cols() && task.col_out) {
      const PartialAxis axis = col_axis(task, vector_size(task));
      col_floats = whole_regions(axis.floats(Op::kSums));
      finish_blocks += axis.blocks(Op::kSums);
    }
    const int64_t floats = batch.floats + row_floats + col_floats;
    const int64_t blocks = batch.blocks + blocks_of(task);
    if (batch.end > begin &&
        (floats * int64_t{sizeof(float)} > kWorkspaceBytes || blocks > kMaxBlocks ||
         batch.finish_blocks + finish_blocks > kMaxBlocks)) {
      break;
    }
    task.first_block = static_cast<uint32_t>(batch.blocks);
    task.first_finish = static_cast<uint32_t>(batch.finish_blocks);
    task.row_partials = static_cast<uint32_t>(batch.floats / kRegion);
    task.col_partials = static_cast<uint32_t>((batch.floats + row_floats) / kRegion);
    batch.floats = floats;
    batch.blocks = blocks;
    batch.finish_blocks += finish_blocks;
    batch.grid |= task.grid;
  }
  return batch;
}

template <class Op>
int64_t workspace_bytes(std::vector<Task> tasks) {
  int64_t floats = 0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(tasks.size());) {
    const Batch batch = next_batch<Op>(tasks, begin);
    floats = std::max(floats, batch.floats);
    begin = batch.end;
  }
  return floats * int64_t{sizeof(float)};
}

template <class Op, int kCapacity>
void launch_batch(const Op& op, const Task* tasks, int64_t count, const Batch& batch,
                  float* workspace, cudaStream_t stream) {
  TaskTable<kCapacity> table;
  table.count = static_cast<int32_t>(count);
  std::copy_n(tasks, count, table.tasks);
  launch(Op::kName, stream, batch.blocks,
         batch.grid ? stream_kernel<Op, true, kCapacity> : stream_kernel<Op, false, kCapacity>,
         table, workspace, op);
  if (batch.finish_blocks) {
    launch(Op::kName, stream, batch.finish_blocks, finish_kernel<Op, kCapacity>, table,
           static_cast<const float*>(workspace));
  }
}

template <class Op>
void run_tasks(const Op& op, std::vector<Task> tasks, void* workspace, void* stream) {
  auto* floats = static_cast<float*>(workspace);
  auto* on = static_cast<cudaStream_t>(stream);
  for (int64_t begin = 0; begin < static_cast<int64_t>(tasks.size());) {
    const Batch batch = next_batch<Op>(tasks, begin);
    const int64_t count = batch.end - begin;
    if (Op::kList && count > kShortTable) {
      if constexpr (Op::kList) {
        launch_batch<Op, kLongTable>(op, &tasks[begin], count, batch, floats, on);
      }
    } else {
      launch_batch<Op, Op::kList ? kShortTable : 1>(op, &tasks[begin], count, batch, floats, on);
    }
    begin = batch.end;
  }
}

}  // namespace tk
