// Writes a number into chosen indices of a dimension of a tensor, as index_fill_ does: what holds
// masked filters at zero. It is bound by the memory that it touches, so that one loop serves every
// instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tk {

// Indices of a dimension, as runs of neighbours: a masked filter is one block of memory, and so are
// filters that lie side by side.
struct IndexRuns {
  struct Run {
    int64_t begin;
    int64_t count;
  };
  std::vector<Run> runs;
  std::vector<int64_t> indices;
  int64_t end = 0;  // behind the largest index

  void add(int64_t index) {
    indices.push_back(index);
    if (!runs.empty() && runs.back().begin + runs.back().count == index) {
      ++runs.back().count;
    } else {
      runs.push_back({index, 1});
    }
    end = std::max(end, index + 1);
  }
};

// Elements in memory as [outer, extent, inner] without gaps; the indices are of the middle one.
struct Block {
  int64_t outer;
  int64_t extent;
  int64_t inner;
};

template <class Element>
void fill_entries(Element* data, const Block& block, const IndexRuns& chosen, Element value) {
  // Runs of single elements take several times as long as the elements.
  const bool scattered = block.inner == 1 && chosen.indices.size() < 4 * chosen.runs.size();
  for (int64_t o = 0; o < block.outer; ++o) {
    Element* const first = data + o * block.extent * block.inner;
    if (scattered) {
      for (const int64_t index : chosen.indices) first[index] = value;
      continue;
    }
    for (const auto& run : chosen.runs) {
      std::fill_n(first + run.begin * block.inner, run.count * block.inner, value);
    }
  }
}

}  // namespace tk
