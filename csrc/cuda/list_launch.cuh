// Launches of kernels whose blocks each take a chunk of the elements of one item of a list: items
// are passed by value, as many as the parameters of a launch hold (task_table.h).
//
// An entry, made of an item, has `elements` and `first_block`.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/task_table.h"
#include "cuda/vector_load.cuh"

namespace tk {

constexpr int kChunk = 1 << 14;  // elements of a block: a multiple of every vector

// Of a launch that has at most 64 bytes of other parameters.
template <class Entry>
constexpr int kEntries = (kParameterBytes - 96) / int{sizeof(Entry)};
template <class Entry>
using ListTable = TaskTable<kEntries<Entry>, Entry>;

// Calls use(table, blocks, before) for each launch that the entries need, `before` the blocks of
// those before it.
template <class Entry, class Use>
void for_launches(const std::vector<Entry>& entries, const Use& use) {
  int64_t before = 0;
  for (size_t next = 0; next < entries.size();) {
    ListTable<Entry> table;
    int64_t blocks = 0;
    for (table.count = 0; table.count < kEntries<Entry> && next < entries.size(); ++next) {
      const int64_t more = divide_up(entries[next].elements, kChunk);
      if (table.count > 0 && blocks + more > kMaxBlocks) break;
      Entry& entry = table.tasks[table.count++] = entries[next];
      entry.first_block = static_cast<uint32_t>(blocks);
      blocks += more;
    }
    use(table, blocks, before);
    before += blocks;
  }
}

template <class Entry>
int64_t blocks_of(const std::vector<Entry>& entries) {
  int64_t blocks = 0;
  for (const Entry& entry : entries) blocks += divide_up(entry.elements, kChunk);
  return blocks;
}

// The elements of an entry that this block takes.
struct Chunk {
  int64_t begin;
  int64_t end;
  template <class Entry>
  __device__ explicit Chunk(const Entry& entry)
      : begin(int64_t{blockIdx.x - entry.first_block} * kChunk),
        end(min(begin + kChunk, entry.elements)) {}
};

inline bool is_aligned(const void* a, const void* b, const void* c) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
          reinterpret_cast<uintptr_t>(c)) %
             kVectorBytes ==
         0;
}

}  // namespace tk
