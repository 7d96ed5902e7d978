// The CPU kernel of second_order_moments (second_order_moments.h).
#include "common/second_order_moments.h"

#include "cpu/kernels.h"
#include "cpu/moment_sums.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
struct Gradient {
  const T* g;
  const T* h;

  void expect(int64_t, int64_t) {}
  template <typename V, class Load>
  V of(V, int64_t i, Load load) const {
    return load(g + i) - splat<V>(0.5) * load(h + i);  // half of it is exact
  }
  void prefetch(int64_t i) const {
    __builtin_prefetch(g + i);
    __builtin_prefetch(h + i);
  }
};

struct SecondOrderMoments {
  static constexpr int kSums = kSecondOrderSums;

  template <typename V>
  static void terms(V w, V g, V (&terms)[kSums]) {
    const V q = g * w;
    terms[0] = q;
    terms[1] = q * q;
  }

  template <typename T>
  Gradient<T> gradient(const ParameterItem& item, int64_t at) const {
    return {static_cast<const T*>(item.g) + at, static_cast<const T*>(item.h) + at};
  }
};

}  // namespace

void second_order_moments(const ParameterItem* items, int64_t count, int threads) {
  sum_moments(SecondOrderMoments(), items, count, threads);
}

}  // namespace TK_ISA
}  // namespace tk
