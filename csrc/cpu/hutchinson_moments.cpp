// The CPU kernel of hutchinson_moments (ops.h).
#include "cpu/kernels.h"
#include "cpu/moment_sums.h"
#include "cpu/sign_window.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
struct WeightedHvp {  // w z (Hz)
  // What a loop reads: all that it needs fits registers.
  struct Reader {
    const T* hvp;
    int64_t first;  // the number of the element that hvp points to
    const SignWindow* signs;

    template <typename V, class Load>
    [[gnu::always_inline]] V of(V w, int64_t i, const Load& load) const {
      const auto at = [&](int64_t element) { return signs->at(first + element); };
      return w * negate(load(hvp + i), load.bits(i, at));
    }
    template <class Ask>
    void prefetch(int64_t i, const Ask& ask) const {
      ask(hvp + i);
    }
  };

  const T* hvp;
  int64_t first;
  SignWindow signs;

  void expect(int64_t begin, int64_t end) { signs.cover(first + begin, first + end); }
  Reader from(int64_t i) const { return {hvp + i, first + i, &signs}; }
  template <typename V, class Load>
  [[gnu::always_inline]] V of(V w, int64_t i, const Load& load) const {
    return from(0).of(w, i, load);
  }
  template <class Ask>
  void prefetch(int64_t i, const Ask& ask) const {
    from(0).prefetch(i, ask);
  }
};

struct HutchinsonMoments {
  static constexpr int kSums = 1;

  uint64_t seed;

  template <typename V>
  struct Terms {
    V w, m;
  };

  template <int, typename V>
  static V add(const Terms<V>& t, V sum) {
    return multiply_add(t.m, t.w, sum);
  }

  template <typename T>
  WeightedHvp<T> multiplier(const ParameterItem& item, int64_t at) const {
    return {static_cast<const T*>(item.hvp) + at, at, SignWindow(seed, item.stream)};
  }
};

}  // namespace

void hutchinson_moments(const ParameterList& call, int threads) {
  sum_moments(HutchinsonMoments{call.seed}, call.items, threads);
}

}  // namespace TK_ISA
}  // namespace tk
