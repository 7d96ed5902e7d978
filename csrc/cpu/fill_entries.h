// Writes a number into chosen indices of a dimension of a tensor, as index_fill_ does: what holds
// masked filters at zero. It is bound by the memory that it touches, so that one loop serves every
// instruction set. A look at one entry of each index takes a small part of the time.
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
  const int64_t step = block.extent * block.inner;
  for (int64_t o = 0; o < block.outer; ++o) {
    Element* const first = data + o * step;
    // The lines of memory of the next step are asked for before those of this one are written:
    // they lie too far apart for a processor to see them coming. Columns of a weight that is not in
    // cache take four fifths of the time so.
    Element* const next = o + 1 < block.outer ? first + step : first;
    if (scattered) {
      for (const int64_t index : chosen.indices) {
        __builtin_prefetch(next + index, 1);
        first[index] = value;
      }
      continue;
    }
    for (const auto& run : chosen.runs) {
      const int64_t begin = run.begin * block.inner, count = run.count * block.inner;
      __builtin_prefetch(next + begin, 1);
      __builtin_prefetch(next + begin + count - 1, 1);
      std::fill_n(first + begin, count, value);
    }
  }
}

// Whether an entry of each of these indices is that number. Which one differs from index to index
// and from look to look: steps of irrational parts of the way come by all entries, and leave no
// part of them out for long.
template <class Element>
bool entries_seem(const Element* data, const Block& block, const IndexRuns& chosen, Element value,
                  uint32_t look) {
  const auto place = [](uint32_t part, int64_t count) {
    return static_cast<int64_t>(part * static_cast<uint64_t>(count) >> 32);
  };
  uint32_t outer = look * 3242174889u, inner = look * 2447445413u;  // parts of 2³²
  for (const int64_t index : chosen.indices) {
    const int64_t o = place(outer, block.outer), i = place(inner, block.inner);
    if (!(data[(o * block.extent + index) * block.inner + i] == value)) return false;  // NaN too
    outer += 2654435769u;
    inner += 1779033703u;
  }
  return true;
}

}  // namespace tk
