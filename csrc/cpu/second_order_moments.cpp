// The CPU kernel of second_order_moments (ops.h).
#include "cpu/kernels.h"
#include "cpu/moment_sums.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
struct ShiftedGradient {  // g − ½h
  const T* grad;
  const T* hvp;

  void expect(int64_t, int64_t) {}
  template <typename V, class Load>
  [[gnu::always_inline]] V of(V, int64_t i, const Load& load) const {
    return multiply_add(splat<V>(-0.5), load(hvp + i), load(grad + i));  // half of it is exact
  }
  template <class Ask>
  void prefetch(int64_t i, const Ask& ask) const {
    ask(grad + i);
    ask(hvp + i);
  }
  ShiftedGradient from(int64_t i) const { return {grad + i, hvp + i}; }
};

struct SecondOrderMoments {
  static constexpr int kSums = 2;

  template <typename V>
  struct Terms {
    V w, m;
    V q() const { return m * w; }
  };

  template <int i, typename V>
  static V add(const Terms<V>& t, V sum) {
    if constexpr (i == 0) return sum + t.q();
    if constexpr (i == 1) return multiply_add(t.q(), t.q(), sum);
  }

  template <typename T>
  ShiftedGradient<T> multiplier(const ParameterItem& item, int64_t at) const {
    return {static_cast<const T*>(item.grad) + at, static_cast<const T*>(item.hvp) + at};
  }
};

}  // namespace

void second_order_moments(const ParameterList& call, int threads) {
  sum_moments(SecondOrderMoments(), call.items, threads);
}

}  // namespace TK_ISA
}  // namespace tk
