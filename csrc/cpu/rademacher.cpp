// The CPU kernel of rademacher (rademacher.h).
#include "common/rademacher.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sign_window.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kTaskElements = 32 * SignWindow::kBatch;

class Worker : public IndependentTasks {
 public:
  Worker(const RademacherList& call, const std::vector<int64_t>& first_tasks)
      : items_(call.items.data()), first_tasks_(&first_tasks), seed_(call.seed) {}

  void run(int64_t task) {
    const auto after = std::upper_bound(first_tasks_->begin(), first_tasks_->end(), task);
    const int64_t i = after - first_tasks_->begin() - 1;
    const int64_t begin = (task - (*first_tasks_)[i]) * kTaskElements;
    switch (size_of(items_[i].dtype)) {
      case 2:
        return fill<uint16_t>(items_[i], begin);
      case 4:
        return fill<uint32_t>(items_[i], begin);
      default:
        return fill<uint64_t>(items_[i], begin);
    }
  }

 private:
  template <typename Bits>
  void fill(const RademacherItem& item, int64_t begin) const {
    using Word = std::conditional_t<sizeof(Bits) == 8, uint64_t, uint32_t>;  // what vectors shift
    const auto one = static_cast<Word>(bits_of_one(item.dtype));
    const int64_t end = std::min(begin + kTaskElements, item.elements);
    Bits* out = static_cast<Bits*>(item.out);
    SignWindow signs(seed_, item.stream);
    for (int64_t i = begin; i < end; i += kLanes) {
      if (i % SignWindow::kBatch == 0) signs.cover(i, i + SignWindow::kBatch);
      const uint32_t bits = signs.at(i);
      Bits elements[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        elements[lane] =
            static_cast<Bits>(one | static_cast<Word>(bits >> lane & 1) << (8 * sizeof(Bits) - 1));
      std::copy_n(elements, std::min<int64_t>(kLanes, end - i), out + i);
    }
  }

  const RademacherItem* items_;
  const std::vector<int64_t>* first_tasks_;
  uint64_t seed_;
};

}  // namespace

void rademacher(const RademacherList& call, int threads) {
  std::vector<int64_t> first_tasks;
  int64_t tasks = 0;
  for (const RademacherItem& item : call.items) {
    first_tasks.push_back(tasks);
    tasks += (item.elements + kTaskElements - 1) / kTaskElements;
  }
  threads = static_cast<int>(std::min<int64_t>(threads, tasks / 4 + 1));  // no thread for a little
  ordered_tasks(tasks, threads, [&] { return Worker(call, first_tasks); });
}

}  // namespace TK_ISA
}  // namespace tk
