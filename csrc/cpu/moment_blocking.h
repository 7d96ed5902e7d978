// How the CPU kernels cut a parameter (parameter.h) into tasks: blocks of rows × tiles of
// positions, a position being channel and kernel element as stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parameter.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {

constexpr int64_t kStrip = 512;               // positions whose column sums fit L1: 10 KB
constexpr int64_t kTile = 16 * kStrip;        // most positions of a task with column sums
constexpr int64_t kTaskElements = 131072;     // 1 MB of w and g: 20 µs, many times a merge
constexpr int64_t kMinRows = 128;             // spreads the folding of a strip over enough rows
constexpr int64_t kMaxRows = 256;             // bounds the float sum down a column
constexpr int64_t kMaxRowSums = 4096;         // of a task without columns: short ones take longer
constexpr int64_t kThreadElements = 1 << 18;  // under 100 µs of work a second thread costs more

// How one item is cut into tasks: groups, then blocks of rows, then tiles. It depends on the
// item's shape alone, and with it every order of summation.
struct MomentBlocking {
  ParameterItem item;
  int64_t first_task, first_merge, positions, groups, group_rows, block_rows, blocks, tile, tiles;

  MomentBlocking(const ParameterItem& it, int64_t task, int64_t merge)
      : item(it), first_task(task), first_merge(merge) {
    positions = item.channels * item.kernel;
    groups = item.col_out ? item.groups : 1;
    group_rows = groups == 1 ? item.rows : item.rows / groups;
    const int64_t most_rows = item.col_out ? kMaxRows : kMaxRowSums;
    tile = item.col_out ? kTile : kTaskElements;
    block_rows = group_rows;
    blocks = tiles = 1;
    // Most parameters of a list are one task, and a division takes as long as a row of sums.
    if (group_rows > most_rows || group_rows * positions > kTaskElements) {
      const int64_t rows = kTaskElements / positions;
      const int64_t least_rows = item.col_out ? kMinRows : 1;
      block_rows = std::min(group_rows, std::clamp(rows, least_rows, most_rows));
      blocks = (group_rows + block_rows - 1) / block_rows;
    }
    if (positions > tile) {
      tiles = (positions + tile - 1) / tile;
      // Tiles of about one size: a narrow last one would read little of each row.
      const int64_t strips = (positions + kStrip - 1) / kStrip;
      tile = (strips + tiles - 1) / tiles * kStrip;
    }
  }

  int64_t end_task() const { return first_task + groups * blocks * tiles; }
  // Whether tasks merge their sums; a task writes rows itself that it begins and ends.
  bool merges() const { return item.col_out || tiles > 1; }
  int64_t end_merge() const {
    return merges() ? first_merge + groups * blocks * tiles : first_merge;
  }
};

struct Block {
  int64_t group, row, rows, begin, end;
  bool first_tile, last_tile, first_of_group, last_of_group;

  Block(const MomentBlocking& blocking, int64_t task) {
    int64_t tile = 0, block = 0;
    group = 0;
    if (task > 0) {
      tile = task % blocking.tiles;
      block = task / blocking.tiles % blocking.blocks;
      group = task / blocking.tiles / blocking.blocks;
    }
    row = group * blocking.group_rows + block * blocking.block_rows;
    rows = std::min(blocking.block_rows, (group + 1) * blocking.group_rows - row);
    begin = tile * blocking.tile;
    end = std::min(begin + blocking.tile, blocking.positions);
    first_tile = tile == 0;
    last_tile = tile == blocking.tiles - 1;
    first_of_group = first_tile && block == 0;
    last_of_group = last_tile && block == blocking.blocks - 1;
  }
};

}  // namespace TK_ISA
}  // namespace tk
