// The CPU kernel of mirror_step (mirror_step.h).
#include "common/mirror_step.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/elementary.h"
#include "cpu/item_tasks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/store.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 14;
// Half types are widened so many elements at a time, into scratch that stays in the first cache.
constexpr int64_t kBlock = 1 << 10;
constexpr int kMostPlanes = 3;

template <typename S>
struct VectorMath {
  using V = typename Sum<S>::Vector;
  static V splat(double x) { return tk::splat<V>(x); }
  static V exp(V x) { return exponential(x); }
  static V tanh(V x) { return hyperbolic_tangent(x); }
  static V multiply_add(V a, V b, V c) { return tk::multiply_add(a, b, c); }
  template <typename Mask>
  static V choose(Mask mask, V a, V b) {
    return tk::choose(mask, a, b);
  }
};

// What a step reads and writes, from one element on.
template <typename S>
struct Run {
  S* param;
  const S* grad;
  S* value[kMostPlanes];
  S* first[kMostPlanes];
  S* second[kMostPlanes];

  template <typename Use>
  void each(const Use& use) {
    use(param);
    use(grad);
    for (int i = 0; i < kMostPlanes; ++i) {
      use(value[i]);
      use(first[i]);
      use(second[i]);
    }
  }
};

template <typename V, typename S>
MirrorNumbers<V> splat_all(const MirrorNumbers<S>& n) {
  return {splat<V>(n.rate), splat<V>(n.decay),     splat<V>(n.decay2), splat<V>(n.eps),
          splat<V>(n.beta), splat<V>(n.next_beta), splat<V>(n.scale),  splat<V>(n.weight_decay)};
}

// `count` elements, whole vectors of them.
template <Direction direction, typename Rule, typename S>
[[gnu::noinline]] void update_vectors(const Run<S>& run, const MirrorNumbers<S>& scalars,
                                      int64_t count) {
  using M = VectorMath<S>;
  using V = typename M::V;
  using Math = MirrorMath<M, Rule>;
  const MirrorNumbers<V> n = splat_all<V>(scalars);
  const V rest = splat<V>(1) - n.decay, rest2 = splat<V>(1) - n.decay2;
  for (int64_t i = 0; i < count; i += Sum<S>::kWidth) {
    V v[Rule::kStored];
    for (int plane = 0; plane < Rule::kStored; ++plane) v[plane] = load(run.value[plane] + i);
    const auto directed = [&](V g, int plane) {
      if constexpr (direction == Direction::gradient) return g;
      V m = load(run.first[plane] + i);
      m = direction == Direction::momentum ? M::multiply_add(n.decay, m, g)
                                           : M::multiply_add(n.decay, m, rest * g);
      store(run.first[plane] + i, m);
      if constexpr (direction == Direction::momentum) return m;
      V square = load(run.second[plane] + i);
      square = M::multiply_add(n.decay2, square, rest2 * g * g);
      store(run.second[plane] + i, square);
      return m / (square_root(square) + n.eps);
    };
    Math::move(v, n.scale * load(run.grad + i), n, directed);
    for (int plane = 0; plane < Rule::kStored; ++plane) store(run.value[plane] + i, v[plane]);
    if constexpr (Rule::kPlanes > 0)
      store(run.param + i, n.scale * Math::project(v, n.next_beta).x);
  }
}

template <typename Rule, typename S>
[[gnu::noinline]] void project_vectors(const Run<S>& run, const MirrorNumbers<S>& scalars,
                                       bool rounded, int64_t count) {
  using V = typename VectorMath<S>::V;
  using Math = MirrorMath<VectorMath<S>, Rule>;
  const MirrorNumbers<V> n = splat_all<V>(scalars);
  for (int64_t i = 0; i < count; i += Sum<S>::kWidth) {
    V v[Rule::kStored];
    for (int plane = 0; plane < Rule::kStored; ++plane) v[plane] = load(run.value[plane] + i);
    const auto projected = Math::project(v, n.next_beta);
    store(run.param + i, n.scale * (rounded ? Math::rounded(projected) : projected.x));
  }
}

template <typename Rule, typename S>
void step_vectors(const MirrorItem& item, const Run<S>& run, int64_t count) {
  const MirrorNumbers<S> n = item.numbers<S>();
  if (!run.grad) return project_vectors<Rule>(run, n, item.rounded, count);
  switch (static_cast<Direction>(item.direction)) {
    case Direction::gradient:
      return update_vectors<Direction::gradient, Rule>(run, n, count);
    case Direction::momentum:
      return update_vectors<Direction::momentum, Rule>(run, n, count);
    case Direction::adam:
      return update_vectors<Direction::adam, Rule>(run, n, count);
  }
}

// Any count: what is left of it after whole vectors is copied into some, and back.
template <typename Rule, typename S>
void step(const MirrorItem& item, Run<S> run, int64_t count) {
  constexpr int kWidth = Sum<S>::kWidth;
  const int64_t whole = count / kWidth * kWidth, left = count - whole;
  step_vectors<Rule>(item, run, whole);
  if (left == 0) return;
  S space[2 + 3 * kMostPlanes][kWidth] = {};
  Run<S> last = run;
  int at = 0;
  last.each([&](auto& pointer) {
    if (pointer) std::copy_n(pointer + whole, left, space[at]);
    pointer = pointer ? space[at] : nullptr;
    ++at;
  });
  step_vectors<Rule>(item, last, kWidth);
  at = 0;
  run.each([&](auto pointer) {
    if constexpr (!std::is_const_v<std::remove_pointer_t<decltype(pointer)>>)
      if (pointer) std::copy_n(space[at], left, pointer + whole);
    ++at;
  });
}

template <typename Rule, typename S>
Run<S> run_from(const MirrorItem& item, int64_t begin) {
  Run<S> run = {};
  const auto plane = [&](void* data, int i) {
    return data ? static_cast<S*>(data) + i * item.elements + begin : nullptr;
  };
  for (int i = 0; i < Rule::kPlanes; ++i) run.value[i] = plane(item.value, i);
  for (int i = 0; i < Rule::kMomentPlanes; ++i) {
    run.first[i] = plane(item.first, i);
    run.second[i] = plane(item.second, i);
  }
  return run;
}

// Widens half types to floats, or rounds floats to them.
template <typename From, typename To>
void copy(const From* from, To* to, int64_t count) {
  constexpr int kWidth = Sum<float>::kWidth;
  for (int64_t i = 0; i < count; i += kWidth)
    store_first(to + i, load_first(from + i, count - i, count - i), count - i);
}

// Elements that are stored as they are computed with.
template <typename Rule, typename T>
void step_elements(const MirrorItem& item, int64_t begin, int64_t end) {
  if constexpr (std::is_floating_point_v<T>) {
    Run<T> run = run_from<Rule, T>(item, begin);
    run.param = static_cast<T*>(item.param) + begin;
    run.grad = item.grad ? static_cast<const T*>(item.grad) + begin : nullptr;
    if constexpr (Rule::kPlanes == 0) run.value[0] = run.param;
    step<Rule>(item, run, end - begin);
  } else {
    float param[kBlock], grad[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t count = std::min(kBlock, end - at);
      T* const stored = static_cast<T*>(item.param) + at;
      Run<float> run = run_from<Rule, float>(item, at);
      run.param = param;
      if (item.grad) {
        copy(static_cast<const T*>(item.grad) + at, grad, count);
        run.grad = grad;
      }
      if constexpr (Rule::kPlanes == 0) {
        copy(stored, param, count);
        run.value[0] = param;
      }
      step<Rule>(item, run, count);
      copy(param, stored, count);
    }
  }
}

class Worker : public IndependentTasks {
 public:
  Worker(const MirrorList& call, const ItemTasks& tasks) : items_(&call.items), tasks_(&tasks) {}

  void run(int64_t task) {
    const auto [i, begin, end] = tasks_->part(task, *items_);
    step_part((*items_)[i], begin, end);
  }

 private:
  static void step_part(const MirrorItem& item, int64_t begin, int64_t end) {
    with_element_type(item.dtype, [&](auto element) {
      with_mirror_rule(item.projection, item.update, item.levels, [&](auto rule) {
        step_elements<decltype(rule), typename decltype(element)::type>(item, begin, end);
      });
    });
  }

  const std::vector<MirrorItem>* items_;
  const ItemTasks* tasks_;
};

}  // namespace

void mirror_step(const MirrorList& call, int threads) {
  const ItemTasks tasks(call.items, kTaskElements);
  threads = static_cast<int>(std::min<int64_t>(threads, tasks.count()));
  ordered_tasks(tasks.count(), threads, [&] { return Worker(call, tasks); });
}

}  // namespace TK_ISA
}  // namespace tk
