// The CPU kernel of sparse_momentum (common/sparse_momentum.h). Compiled once per instruction set
// (TK_ISA); cpu/dispatch.cpp picks one at run time.
#include "common/sparse_momentum.h"

#include <type_traits>

#include "cpu/item_tasks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/score_keys.h"
#include "cpu/store.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 15;
constexpr int64_t kThreadElements = 1 << 17;  // below it, a second thread costs more than it saves

struct Table {
  int64_t key, last, broken;
};

// All lanes, or none.
template <typename V>
inline V all_lanes(bool set) {
  using I = typename SumOf<V>::Integers;
  return reinterpret_cast<V>(I{} - (set ? 1 : 0));
}

class Worker : public IndependentTasks {
 public:
  Worker(const SparseMomentumArgs& call, const ItemTasks& tasks, const Table& table)
      : items_(&call.items), tasks_(&tasks), table_(table) {}

  void run(int64_t task) {
    const auto [i, begin, end] = tasks_->part(task, *items_);
    const MomentumItem& item = (*items_)[i];
    with_element_type(item.dtype, [&, begin = begin, end = end](auto element) {
      using T = typename decltype(element)::type;
      if (!item.ranked)
        return step<T>(item, begin, end,
                       [](auto, auto g, int64_t, int64_t) { return all_lanes<decltype(g)>(true); });
      if (!item.row_scores)
        return step<T>(item, begin, end, [&](auto w, auto g, int64_t at, int64_t) {
          return by_element(w, g, item.first + at);
        });
      // Rows one after the other: all elements of one are active, or none.
      for (int64_t at = begin; at < end;) {
        const int64_t row = at / item.row_elements;
        const int64_t stop = std::min(end, (row + 1) * item.row_elements);
        const bool active =
            is_active(static_cast<const float*>(item.row_scores)[row], item.first + row);
        step<T>(item, at, stop,
                [&](auto, auto g, int64_t, int64_t) { return all_lanes<decltype(g)>(active); });
        at = stop;
      }
    });
  }

 private:
  bool is_active(float score, int64_t position) const {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    const int64_t key = key_of(bits, false);
    return key > table_.key || (key == table_.key && position <= table_.last);
  }

  Floats by_element(Floats w, Floats g, int64_t position) const {
    const KeyBits key = magnitudes(g * w), last = KeyBits{} + static_cast<int32_t>(table_.key);
    const int64_t before = std::clamp<int64_t>(table_.last - position, -1, kKeyLanes);
    const KeyBits ties = keep_first(key == last, before + 1);
    return reinterpret_cast<Floats>((key > last) | ties);
  }

  Doubles by_element(Doubles w, Doubles g, int64_t position) const {
    Sum<double>::Integers active{};
    for (int i = 0; i < Sum<double>::kWidth; ++i)
      active[i] = -int64_t{is_active(narrowed(g[i] * w[i]), position + i)};
    return reinterpret_cast<Doubles>(active);
  }

  // `active(w, g, at, n)` gives a register whose bits are set where the gradient counts.
  template <typename T, class Active>
  void step(const MomentumItem& item, int64_t begin, int64_t end, const Active& active) const {
    using V = typename Sum<T>::Vector;
    using I = typename Sum<T>::Integers;
    constexpr int kWidth = Sum<T>::kWidth;
    T* weight = static_cast<T*>(item.weight);
    const T* grad = static_cast<const T*>(item.grad);
    T* momentum = static_cast<T*>(item.momentum);
    const V lr = splat<V>(item.lr), decay = splat<V>(item.decay), beta = splat<V>(item.beta);
    for (int64_t i = begin; i < end; i += kWidth) {
      const int64_t n = end - i;
      const V w = load_first(weight + i, n, n), g = load_first(grad + i, n, n);
      const V z = load_first(momentum + i, n, n);
      const V reached =
          reinterpret_cast<V>(reinterpret_cast<I>(g) & reinterpret_cast<I>(active(w, g, i, n)));
      const V moved = (beta * z + decay * w) + reached;
      store_first(momentum + i, moved, n);
      store_first(weight + i, w - lr * moved, n);
    }
  }

  const std::vector<MomentumItem>* items_;
  const ItemTasks* tasks_;
  Table table_;
};

}  // namespace

void sparse_momentum(const SparseMomentumArgs& call, int threads) {
  const auto* values = static_cast<const int64_t*>(call.table);
  const Table table{values[0], values[1], values[2]};
  if (table.broken) return;
  const ItemTasks tasks(call.items, kTaskElements);
  int64_t elements = 0;
  for (const MomentumItem& item : call.items) elements += item.elements;
  threads = static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1));
  ordered_tasks(tasks.count(), threads, [&] { return Worker(call, tasks, table); });
}

}  // namespace TK_ISA
}  // namespace tk
