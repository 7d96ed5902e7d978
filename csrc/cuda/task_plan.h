// How a task is cut into blocks of threads. Everything here depends on the task's shape and dtype
// alone, and so do the bits of its result; only Task::aligned looks at the addresses.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/task_table.h"

namespace tk {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A block of a rows task reads about this much of either tensor: enough to pay for its launch and
// its reduction, little enough that a single mid-sized tensor still spreads over a whole GPU.
constexpr int kChunkBytes = 32 << 10;
// Segments of one row: they fill the largest GPU, and the second stage stays short.
constexpr int kMaxSegments = 2048;
// Below four vectors the parts of a row that are no whole vector outweigh the rest.
constexpr int kMinVectors = 4;
// Rows that a block of a matrix task takes. More rows mean fewer partial column sums.
constexpr int kMaxBlockRows = 256;
constexpr int kMinBlockRows = 64;
// Blocks that fill a GPU; with fewer, a matrix task is cut finer, down to kMinBlockRows.
constexpr int kFillBlocks = 512;

// Lists whose partial sums exceed this are cut: the parts share the workspace one after another.
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
constexpr int64_t kMaxBlocks = INT32_MAX;  // of a launch

TK_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int floor_log2(int64_t n) {
  int log = 0;
  while (n > 1) {
    n /= 2;
    ++log;
  }
  return log;
}

// Elements that a lane takes at once. No f64 here: an element has 4 or 2 bytes.
TK_HOST_DEVICE inline int vector_size(const Task& task) {
  if (!task.vectors) return 1;
  return static_cast<DType>(task.dtype) == DType::f32 ? 4 : 8;
}

inline void set_inputs(Task& task, const void* a, const void* b, DType dtype) {
  task.a = a;
  task.b = b;
  task.dtype = static_cast<uint8_t>(dtype);
  task.aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

inline void set_inputs(Task& task, const void* a, const void* b, const void* c, DType dtype) {
  set_inputs(task, a, b, dtype);
  task.c = c;
  task.aligned = task.aligned && reinterpret_cast<uintptr_t>(c) % 16 == 0;
}

// Needs a, b, dtype, rows, columns.
inline void plan_rows(Task& task) {
  const int64_t element = size_of(static_cast<DType>(task.dtype));
  const int64_t vector = 16 / element;
  const int64_t chunk = kChunkBytes / element;
  task.is_matrix = false;
  task.groups = 1;
  task.repeat = 1;
  task.vectors = task.columns >= kMinVectors * vector || task.columns % vector == 0;

  // At least four vectors per lane, as many as it has in flight, up to a block. Where rows are not
  // made of whole vectors, the elements around those are loaded one after the other: a lane or two
  // for each, up to a warp.
  const int64_t loads = task.columns / (task.vectors ? vector : 1);
  const int least = task.columns % vector == 0 ? 0 : floor_log2(std::min<int64_t>(loads, 32));
  task.width_log2 = std::clamp(floor_log2(loads / 4), least, 8);
  const int64_t lane_groups = kThreads >> task.width_log2;

  const int64_t chunks = divide_up(task.columns, chunk);
  task.tiles = divide_up(chunks, divide_up(chunks, kMaxSegments));
  task.block_rows = lane_groups * std::max<int64_t>(1, chunk / (task.columns * lane_groups));
  task.row_blocks = divide_up(task.rows, task.block_rows);
}

// Needs a, b, dtype, groups, rows, columns, run, run_in_rows, row_out.
inline void plan_matrix(Task& task) {
  const int64_t vector = 16 / size_of(static_cast<DType>(task.dtype));
  task.is_matrix = true;
  const int64_t period = task.columns * task.col_run();
  // A row has to start where a vector does, or its vectors could not be loaded at once.
  task.vectors = period % vector == 0 && (!task.row_out || period >= kMinVectors * vector);

  const int64_t warp_span = 32 * vector_size(task);
  task.repeat = task.row_out ? 1 : std::max<int64_t>(1, warp_span / period);
  const int64_t rows = divide_up(task.rows, task.repeat);
  const int64_t length = period * task.repeat;

  // Warps stand below each other, or beside each other where there are few rows to go round.
  task.width_log2 = length <= warp_span || rows > 16 ? 0 : rows > 8 ? 1 : rows > 4 ? 2 : 3;
  task.tiles = divide_up(length, warp_span << task.width_log2);
  int64_t block_rows = task.width_log2 ? 4 * kWarps >> task.width_log2 : kMaxBlockRows;
  while (block_rows > kMinBlockRows &&
         task.groups * divide_up(rows, block_rows) * task.tiles < kFillBlocks) {
    block_rows /= 2;
  }
  task.block_rows = block_rows;
  task.row_blocks = divide_up(rows, block_rows);
}

inline int64_t blocks_of(const Task& task) {
  return int64_t{task.groups} * task.row_blocks * task.tiles;
}

// One axis of a task's result whose sums come in parts, for the second stage to add:
// partials [groups, parts, sums, slots]. Entry i of a group has its parts in the slots from
// i + i·run / width to i + (i·run + run - 1) / width, since a run may straddle parts of `width`.
struct PartialAxis {
  int64_t entries;  // of a group
  int64_t groups;
  int64_t parts;
  int64_t slots;
  int64_t run;
  int64_t width;

  TK_HOST_DEVICE int64_t floats(int sums) const { return groups * parts * sums * slots; }

  // Threads that share a result's parts; the other threads of a block take other results.
  TK_HOST_DEVICE int threads_log2() const {
    int log = 0;
    while (log < 5 && int64_t{1} << log < parts) ++log;
    return log;
  }

  TK_HOST_DEVICE int64_t blocks(int sums) const {
    return divide_up(groups * entries * sums, kThreads >> threads_log2());
  }
};

TK_HOST_DEVICE inline PartialAxis row_axis(const Task& task) {
  const int64_t entries = task.rows / task.row_run();
  if (!task.is_matrix) return {entries, 1, task.tiles, entries, 1, INT64_MAX};
  return {entries,        task.groups,    task.tiles, entries + task.row_blocks,
          task.row_run(), task.block_rows};
}

// Elements that a block takes along a row of the matrix.
TK_HOST_DEVICE inline int64_t tile_width(const Task& task, int vector) {
  return int64_t{32 * vector} << task.width_log2;
}

TK_HOST_DEVICE inline PartialAxis col_axis(const Task& task, int vector) {
  return {task.columns,    task.groups,
          task.row_blocks, task.columns + task.tiles,
          task.col_run(),  tile_width(task, vector)};
}

}  // namespace tk
