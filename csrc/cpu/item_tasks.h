// The elements of a list's items in tasks of equal size, none of which reaches over two items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tk {

class ItemTasks {
  std::vector<int64_t> first_tasks_;  // of each item, and how many there are
  int64_t size_;

 public:
  struct Part {
    int64_t item, begin, end;  // elements of the item
  };

  template <class Item>
  ItemTasks(const std::vector<Item>& items, int64_t size) : size_(size) {
    first_tasks_.reserve(items.size() + 1);
    int64_t tasks = 0;
    for (const Item& item : items) {
      first_tasks_.push_back(tasks);
      tasks += (item.elements + size - 1) / size;
    }
    first_tasks_.push_back(tasks);
  }

  int64_t count() const { return first_tasks_.back(); }

  // Its part of an item with so many elements as `items[item]` has.
  template <class Item>
  Part part(int64_t task, const std::vector<Item>& items) const {
    const auto after = std::upper_bound(first_tasks_.begin(), first_tasks_.end(), task);
    const int64_t item = after - first_tasks_.begin() - 1;
    const int64_t begin = (task - first_tasks_[item]) * size_;
    return {item, begin, std::min(begin + size_, items[item].elements)};
  }
};

}  // namespace tk
