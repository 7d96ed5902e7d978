// Tasks and launches for a list of parameters (parameter.h) of one op. Beside what task_launch.cuh
// asks of an op, it has set_inputs(task, item).
#pragma once

#include "common/ops.h"
#include "cuda/task_launch.cuh"

namespace tk {

// What most ops over parameters have in common; one with a third operand says which.
struct ParameterOp {
  static constexpr bool kRows = true;
  static constexpr bool kList = true;
  static constexpr Operand kOperand = Operand::none;
};

inline void add_rows_task(std::vector<Task>& tasks, Task task, int64_t rows, int64_t columns,
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
// registers and no shared memory. The rest are matrix tasks.
template <class Op>
void add_tasks(std::vector<Task>& tasks, const ParameterItem& item) {
  const int64_t filter = item.channels * item.kernel;
  if (item.rows * filter == 0) return;  // nothing to read; the caller zeroes its outputs
  auto* row_out = static_cast<float*>(item.row_out);
  auto* col_out = static_cast<float*>(item.col_out);
  const int64_t group_rows = item.rows / item.groups;
  const bool channels_last = item.channels_last && item.kernel > 1 && item.channels > 1;

  Task task = {};
  Op::set_inputs(task, item);
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
    plan_matrix(task);
    tasks.push_back(task);
  }
}

template <class Op>
std::vector<Task> make_tasks(const std::vector<ParameterItem>& items) {
  std::vector<Task> tasks;
  tasks.reserve(items.size());
  for (const ParameterItem& item : items) add_tasks<Op>(tasks, item);
  return tasks;
}

// The function that ops.h declares of an op; `made` is its struct, made for the list `call`.
#define TK_DEFINE_PARAMETER_OP(op, made)                                              \
  void op##_cuda(const ParameterList& call, const Allocate& allocate, void* stream) { \
    run_tasks(made, make_tasks<decltype(made)>(call.items), allocate, stream);        \
  }

}  // namespace tk
