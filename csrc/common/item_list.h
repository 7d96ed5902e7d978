// The call of an op that takes a list.
#pragma once

#include <cstdint>
#include <vector>

namespace tk {

template <class Item>
struct ItemList {
  std::vector<Item> items;
  uint64_t seed = 0;  // of random signs, for an op that draws some (philox.h)
};

}  // namespace tk
