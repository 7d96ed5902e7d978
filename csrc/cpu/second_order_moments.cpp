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
  V of(V, int64_t i, Load load) const {
    return load(grad + i) - splat<V>(0.5) * load(hvp + i);  // half of it is exact
  }
  void prefetch(int64_t i) const {
    __builtin_prefetch(grad + i);
    __builtin_prefetch(hvp + i);
  }
};

struct SecondOrderMoments {
  static constexpr int kSums = 2;

  template <typename V>
  static void terms(V w, V m, V (&terms)[kSums]) {
    const V q = m * w;
    terms[0] = q;
    terms[1] = q * q;
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
