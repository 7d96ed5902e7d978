// The CPU kernel of filter_moments (ops.h). Compiled once per instruction set (TK_ISA);
// cpu/dispatch.cpp picks one at run time.
#include "cpu/kernels.h"
#include "cpu/moment_sums.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
struct Gradient {
  const T* grad;

  void expect(int64_t, int64_t) {}
  template <typename V, class Load>
  [[gnu::always_inline]] V of(V, int64_t i, const Load& load) const {
    return load(grad + i);
  }
  void prefetch(int64_t i) const { __builtin_prefetch(grad + i); }
};

struct FilterMoments {
  static constexpr int kSums = 5;

  template <typename V>
  struct Terms {
    V w, g;
    V gw() const { return g * w; }
  };

  template <int i, typename V>
  static V add(const Terms<V>& t, V sum) {
    if constexpr (i == 0) return sum + t.gw();
    if constexpr (i == 1) return multiply_add(t.gw(), t.gw(), sum);
    if constexpr (i == 2) return sum + abs(t.gw());
    if constexpr (i == 3) return multiply_add(t.w, t.w, sum);
    if constexpr (i == 4) return multiply_add(t.g, t.g, sum);
  }

  template <typename T>
  Gradient<T> multiplier(const ParameterItem& item, int64_t at) const {
    return {static_cast<const T*>(item.grad) + at};
  }
};

}  // namespace

void filter_moments(const ParameterList& call, int threads) {
  sum_moments(FilterMoments(), call.items, threads);
}

}  // namespace TK_ISA
}  // namespace tk
