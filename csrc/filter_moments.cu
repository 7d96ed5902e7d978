#include "filter_moments.h"
#include "launch.cuh"

namespace tk {
namespace {

struct FilterMoments {
  static constexpr const char* kName = "filter_moments";
  static constexpr int kSums = kMoments;
  static constexpr bool kRows = true;
  static constexpr bool kShifts = false;
  static constexpr bool kList = true;

  static __device__ void add(float (&sums)[kSums], float w, float g, float) {
    const float gw = __fmul_rn(g, w);
    sums[0] = __fadd_rn(sums[0], gw);
    sums[1] = __fmaf_rn(gw, gw, sums[1]);
    sums[2] = __fadd_rn(sums[2], fabsf(gw));
    sums[3] = __fmaf_rn(w, w, sums[3]);
    sums[4] = __fmaf_rn(g, g, sums[4]);
  }
};

void add_rows_task(std::vector<Task>& tasks, Task task, int64_t rows, int64_t columns,
                   float* row_out, float* col_out) {
  task.rows = rows;
  task.columns = columns;
  task.run = 1;
  task.row_out = row_out;
  task.col_out = col_out;
  plan_rows(task);
  tasks.push_back(task);
}

// Where the elements of a row, or of a column, are contiguous, rows tasks do: they need fewer
// registers and no shared memory. The rest are grids.
void add_tasks(std::vector<Task>& tasks, const FilterMomentsItem& item) {
  const int64_t filter = item.channels * item.kernel;
  if (item.rows * filter == 0) return;  // nothing to read; the caller zeroes its outputs
  auto* row_out = static_cast<float*>(item.row_out);
  auto* col_out = static_cast<float*>(item.col_out);
  const int64_t group_rows = item.rows / item.groups;
  const bool channels_last = item.channels_last && item.kernel > 1 && item.channels > 1;

  Task task = {};
  set_inputs(task, item.w, item.g, item.dtype);
  if (!col_out) {
    if (row_out) add_rows_task(tasks, task, item.rows, filter, row_out, nullptr);
  } else if (item.channels == 1 && group_rows == 1) {  // depthwise: a column is a row
    add_rows_task(tasks, task, item.rows, filter, row_out, col_out);
  } else if (item.channels == 1 && !row_out) {
    add_rows_task(tasks, task, item.groups, group_rows * filter, col_out, nullptr);
  } else if (group_rows == 1 && !channels_last && !row_out) {
    add_rows_task(tasks, task, item.rows * item.channels, item.kernel, col_out, nullptr);
  } else {
    task.groups = static_cast<uint32_t>(item.groups);
    task.rows = group_rows * (channels_last ? item.kernel : 1);
    task.columns = item.channels;
    task.run = item.kernel;
    task.run_in_rows = channels_last;
    task.row_out = row_out;
    task.col_out = col_out;
    plan_grid(task);
    tasks.push_back(task);
  }
}

std::vector<Task> make_tasks(const FilterMomentsItem* items, int64_t count) {
  std::vector<Task> tasks;
  tasks.reserve(count);
  for (int64_t i = 0; i < count; ++i) add_tasks(tasks, items[i]);
  return tasks;
}

}  // namespace

int64_t filter_moments_cuda_workspace(const FilterMomentsItem* items, int64_t count) {
  return workspace_bytes<FilterMoments>(make_tasks(items, count));
}

void filter_moments_cuda(const FilterMomentsItem* items, int64_t count, void* workspace,
                         void* stream) {
  run_tasks<FilterMoments>(make_tasks(items, count), workspace, stream);
}

}  // namespace tk
