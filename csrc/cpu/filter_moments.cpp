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
  V of(V, int64_t i, Load load) const {
    return load(grad + i);
  }
  void prefetch(int64_t i) const { __builtin_prefetch(grad + i); }
};

struct FilterMoments {
  static constexpr int kSums = 5;

  template <typename V>
  static void terms(V w, V g, V (&terms)[kSums]) {
    const V gw = g * w;
    terms[0] = gw;
    terms[1] = gw * gw;
    terms[2] = abs(gw);
    terms[3] = w * w;
    terms[4] = g * g;
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
