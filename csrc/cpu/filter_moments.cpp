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
  template <class Ask>
  void prefetch(int64_t i, const Ask& ask) const {
    ask(grad + i);
  }
  Gradient from(int64_t i) const { return {grad + i}; }
};

// Of the five sums, those of `columns`. The others are not computed.
template <int... columns>
struct FilterMoments {
  static constexpr int kSums = sizeof...(columns);
  static constexpr int kColumns = 5;
  static constexpr int kColumn[] = {columns...};

  uint32_t wanted;

  template <typename V>
  struct Terms {
    V w, g;
    V gw() const { return g * w; }
  };

  template <int i, typename V>
  static V add(const Terms<V>& t, V sum) {
    constexpr int column = kColumn[i];
    if constexpr (column == 0) return sum + t.gw();
    if constexpr (column == 1) return multiply_add(t.gw(), t.gw(), sum);
    if constexpr (column == 2) return sum + abs(t.gw());
    if constexpr (column == 3) return multiply_add(t.w, t.w, sum);
    if constexpr (column == 4) return multiply_add(t.g, t.g, sum);
  }

  template <typename T>
  Gradient<T> multiplier(const ParameterItem& item, int64_t at) const {
    return {static_cast<const T*>(item.grad) + at};
  }
};

}  // namespace

// One sum of products alone, as most criteria read it, has kernels of its own, which take
// less time where the inputs are in cache. Any other set is picked out of all five, and so is every
// set on the baseline, which few processors run, to spare the compiler.
void filter_moments(const ParameterList& call, int threads) {
  const auto sum = [&](auto op) { sum_moments(op, call.items, threads); };
#if defined(__AVX2__) || defined(__aarch64__)
  if (call.sums == 1 << 0) return sum(FilterMoments<0>{call.sums});
  if (call.sums == 1 << 1) return sum(FilterMoments<1>{call.sums});
  if (call.sums == 1 << 2) return sum(FilterMoments<2>{call.sums});
#endif
  sum(FilterMoments<0, 1, 2, 3, 4>{call.sums});
}

}  // namespace TK_ISA
}  // namespace tk
