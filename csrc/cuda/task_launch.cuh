// Launches of the tasks of one op: as many in a launch as a table and the workspace hold. Beside
// what task_kernels.cuh asks of an op, it has kName, and kList if its tasks may be many.
#pragma once

#include <algorithm>
#include <vector>

#include "common/ops.h"
#include "cuda/launch.cuh"
#include "cuda/task_kernels.cuh"

namespace tk {

// The tasks of one launch, and the workspace they need.
struct Batch {
  int64_t end = 0;  // one past its last task
  int64_t blocks = 0;
  int64_t finish_blocks = 0;
  int64_t floats = 0;
  bool has_matrix = false;
};

// Of so many floats; null for none.
inline void* workspace_of(int64_t floats, const Allocate& allocate) {
  return floats ? allocate(floats * int64_t{sizeof(float)}) : nullptr;
}

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
    if (task.splits_rows() && (task.row_out || !task.is_matrix)) {
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
    batch.has_matrix |= task.is_matrix;
  }
  return batch;
}

template <class Op, int kCapacity>
void launch_batch(const Op& op, const Task* tasks, int64_t count, const Batch& batch,
                  float* workspace, cudaStream_t stream) {
  TaskTable<kCapacity> table;
  table.count = static_cast<int32_t>(count);
  std::copy_n(tasks, count, table.tasks);
  launch(
      Op::kName, stream, batch.blocks,
      batch.has_matrix ? stream_kernel<Op, true, kCapacity> : stream_kernel<Op, false, kCapacity>,
      table, workspace, op);
  if (batch.finish_blocks) {
    launch_early(Op::kName, stream, batch.finish_blocks, finish_kernel<Op, kCapacity>, table,
                 static_cast<const float*>(workspace));
  }
}

template <class Op>
void run_batch(const Op& op, const Task* tasks, int64_t count, const Batch& batch, float* workspace,
               cudaStream_t stream) {
  if constexpr (Op::kList) {
    if (count > kShortTable) {
      return launch_batch<Op, kLongTable>(op, tasks, count, batch, workspace, stream);
    }
  }
  launch_batch<Op, Op::kList ? kShortTable : 1>(op, tasks, count, batch, workspace, stream);
}

template <class Op>
void run_tasks(const Op& op, std::vector<Task> tasks, const Allocate& allocate, void* stream) {
  std::vector<Batch> batches;
  int64_t floats = 0;
  for (int64_t begin = 0; begin < static_cast<int64_t>(tasks.size());) {
    batches.push_back(next_batch<Op>(tasks, begin));
    floats = std::max(floats, batches.back().floats);
    begin = batches.back().end;
  }
  auto* workspace = static_cast<float*>(workspace_of(floats, allocate));
  int64_t begin = 0;
  for (const Batch& batch : batches) {
    run_batch(op, &tasks[begin], batch.end - begin, batch, workspace,
              static_cast<cudaStream_t>(stream));
    begin = batch.end;
  }
}

}  // namespace tk
