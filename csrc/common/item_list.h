// The call of an op that takes a list.
#pragma once

#include <cstdint>
#include <vector>

namespace tk {

template <class Item>
struct ItemList {
  std::vector<Item> items;
  uint64_t seed = 0;  // of random signs, for an op that draws some (philox.h)
  // Of filter_moments on the CPU, which sums are wanted, a bit each; the others come out as NaN.
  uint32_t sums = UINT32_MAX;
};

}  // namespace tk
