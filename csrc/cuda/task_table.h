// What one launch works on: a table of tasks, passed by value as a kernel parameter. Nothing is
// copied to the device beforehand, and a CUDA graph keeps the table with the launch.
//
// A task sums terms of the element pairs (a, b) of one tensor pair, or of triples. Two shapes:
//   rows    the sums of each of `rows` rows of `columns` contiguous elements, each row in `tiles`
//           segments
//   matrix  `groups` matrices of `rows` rows with `columns * run` positions, summed along the rows
//           (a block of them at a time), along the positions (a tile at a time), or both
// A `run` is what one result covers on one of the two axes of a matrix: with run_in_rows, `run`
// consecutive rows are one row of the result; without, `run` consecutive positions one column.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace tk {

struct Task {
  const void* a;
  const void* b;
  union {  // the third operand: Op::kOperand says which it is
    const void* c;
    uint32_t stream;
  };
  float* row_out;  // [groups * rows / row run, sums]; may be null
  float* col_out;  // [groups * columns, sums]; a rows task writes its result to both
  int64_t rows;
  int64_t columns;
  int64_t run;  // rows task: the number of channels, row r has channel r % run
  uint32_t groups;
  uint32_t tiles;
  uint32_t row_blocks;
  uint32_t block_rows;
  uint32_t first_block;   // of this task, among the blocks of the launch
  uint32_t first_finish;  // the same for the second stage
  uint32_t row_partials;  // offset of the partial sums in the workspace, in units of kRegion
  uint32_t col_partials;
  uint16_t repeat;     // matrix: rows laid side by side as one, where rows are shorter than a warp
  uint8_t width_log2;  // rows: lanes for a row. matrix: warps beside each other along the positions
  uint8_t dtype;       // a DType
  bool is_matrix;
  bool vectors;  // elements go to threads by 16-byte vectors, else one by one
  bool aligned;  // and those can be loaded at once
  bool run_in_rows;

  TK_HOST_DEVICE int64_t row_run() const { return is_matrix && run_in_rows ? run : 1; }
  TK_HOST_DEVICE int64_t col_run() const { return is_matrix && !run_in_rows ? run : 1; }
  TK_HOST_DEVICE bool splits_rows() const { return tiles > 1 || row_run() > 1; }
  TK_HOST_DEVICE bool splits_cols() const {
    return is_matrix && (row_blocks > 1 || (tiles > 1 && col_run() > 1));
  }
};

constexpr int kRegion = 64;  // floats: 256 bytes

// The most tasks in one launch: CUDA 12.1 and later pass up to 32,764 bytes of parameters. A short
// table is its own kernel, since all of the parameter is copied at every launch.
constexpr int kParameterBytes = 32764;
constexpr int kLongTable = (kParameterBytes - 32) / int{sizeof(Task)};
static_assert(kLongTable > 300, "the layers of all but the deepest networks");
constexpr int kShortTable = 16;

template <int kCapacity, class Each = Task>
struct TaskTable {
  int32_t count;
  Each tasks[kCapacity];

  // The last task that starts at or before the block; `first` is one of its members first_*.
  TK_HOST_DEVICE const Each& find(uint32_t block, uint32_t Each::* first) const {
    int low = 0;
    int high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (tasks[middle].*first <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return tasks[low];
  }
};

}  // namespace tk
