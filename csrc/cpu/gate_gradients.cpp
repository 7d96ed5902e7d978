// The CPU kernel of gate_gradients; formula and layouts: gate_gradients.h. Compiled once per
// instruction set (TK_ISA); cpu/dispatch.cpp picks one at run time.
//
// Where an example's channels are rows (inner > 1), a channel is summed along memory; where the
// channel is innermost, channels are the lanes and positions run past them. A task is one
// example's span of channels, so no two tasks meet in an output.
#include "common/gate_gradients.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kRun = 2048;                // elements summed in float before a double takes over
constexpr int kRows = 4;                      // of channels, whose sums share additions
constexpr int64_t kPositions = 256;           // the same down a column
constexpr int64_t kChannels = 64;             // channels side by side: four cache lines a position
constexpr int64_t kTaskElements = 32768;      // 256 KB of y and dy: 10 µs
constexpr int64_t kThreadElements = 1 << 18;  // under 100 µs of work a second thread costs more

// (y − bias)·dy, added up. Without a bias nothing is subtracted: Inf − 0 and −0 − 0 are themselves.
template <bool kBias, typename V>
[[gnu::always_inline]] inline V add(V y, V bias, V dy, V sum) {
  return multiply_add(kBias ? y - bias : y, dy, sum);
}

// Adds to each of `rows` ≤ kRows totals Σ (y − bias)·dy along the n ≤ kRun elements of a row,
// `stride` apart, of which `readable` may be read from the first on: four times sixteen lanes, in
// as many passes as it takes to hold them in registers. The rows' lanes are added up together.
template <bool kBias, typename T>
[[gnu::noinline]] void sum_runs(const T* y, const T* dy, const typename Sum<T>::Scalar* biases,
                                int64_t stride, int64_t rows, int64_t n, int64_t readable,
                                double* totals) {
  using S = typename Sum<T>::Scalar;
  using V = typename Sum<T>::Vector;
  constexpr int kWidth = Sum<T>::kWidth, kChains = 4, kStep = kChains * kLanes;
  constexpr int kPasses = passes<S>(kChains), kEach = kRegistersOf<S> / kPasses;
  constexpr int kLine = 64 / sizeof(T);  // elements that a prefetch asks for
  const int64_t full = n / kStep * kStep, tail = n / kLanes * kLanes;
  V sums[kRows][kRegistersOf<S>];
  for (int64_t row = rows; row < kRows; ++row)
    for (V& none : sums[row]) none = V{};
  for (int64_t row = 0; row < rows; ++row, y += stride, dy += stride, readable -= stride) {
    const V bias = kBias ? biases[row] - V{} : V{};
    unrolled<kPasses>([&](auto pass) __attribute__((always_inline)) {
      V part[kChains][kEach] = {};
      auto ask = [&](int64_t i) {
        if (pass > 0) return;
        __builtin_prefetch(y + i + kAhead);
        __builtin_prefetch(dy + i + kAhead);
      };
      auto add_at = [&](int64_t i, V& sum) {
        sum = add<kBias>(load(y + i), bias, load(dy + i), sum);
      };
      auto at = [&](int64_t from, auto chain, auto k) {
        return from + chain * kLanes + (pass * kEach + k) * kWidth;
      };
      for (int64_t from = 0; from < full; from += kStep) {
        unrolled<kStep / kLine>([&](auto line) { ask(from + line * kLine); });
        unrolled<kChains>([&](auto chain) {
          unrolled<kEach>([&](auto k) { add_at(at(from, chain, k), part[chain][k]); });
        });
      }
      V rest[kEach] = {};  // of what is no whole sixteen
      if (tail < n)
        unrolled<kEach>([&](auto k) {
          const int64_t i = tail + (pass * kEach + k) * kWidth;
          const V a = load_first(y + i, n - i, readable - i);
          const V b = load_first(dy + i, n - i, readable - i);
          // Masked last: the bias may be infinite.
          rest[k] = keep_first(add<kBias>(a, bias, b, V{}), n - i);
        });
      unrolled<kChains>([&](auto chain) {
        const int64_t from = full + chain * kLanes;
        if (from < tail) {
          if (chain * kLanes % kLine == 0) ask(from);
          unrolled<kEach>([&](auto k) { add_at(at(full, chain, k), part[chain][k]); });
        } else if (from < n) {
          for (int k = 0; k < kEach; ++k) part[chain][k] += rest[k];
        }
      });
      for (int k = 0; k < kEach; ++k)
        sums[row][pass * kEach + k] = (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
    });
  }
  add_lanes(sums, totals);
}

// Σ over `positions` rows of `stride` elements, for the kCount registers of adjacent channels of
// which `width` are there.
template <int kCount, bool kBias, typename T>
[[gnu::noinline]] void sum_channels(const T* y, const T* dy, const T* bias, int64_t stride,
                                    int64_t positions, int64_t width, double* totals) {
  using V = typename Sum<T>::Vector;
  constexpr int kWidth = Sum<T>::kWidth;
  V b[kCount] = {};
  if (kBias)
    for (int v = 0; v < kCount; ++v) {
      const int64_t left = width - v * kWidth;
      b[v] = load_first(bias + v * kWidth, left, left);
    }
  std::fill_n(totals, width, 0.0);
  for (int64_t begin = 0; begin < positions; begin += kPositions) {
    const int64_t end = std::min(begin + kPositions, positions);
    typename Sum<T>::Scalar columns[kCount * kWidth];
    auto run = [&](auto load_at) {
      V sum[kCount] = {};
      for (int64_t p = begin; p < end; ++p)
        unrolled<kCount>([&](auto v) {
          const int64_t i = p * stride + v * kWidth;
          sum[v] = add<kBias>(load_at(y + i, p, v), b[v], load_at(dy + i, p, v), sum[v]);
        });
      unrolled<kCount>([&](auto v) {
        const V each = sum[v];
        std::memcpy(columns + v * kWidth, &each, sizeof(each));
      });
    };
    if (width == kCount * kWidth)
      run([](const T* from, int64_t, int) { return load(from); });
    else
      run([&](const T* from, int64_t p, int v) {
        const int64_t left = width - v * kWidth;
        const int64_t readable = (positions - 1 - p) * stride + left;
#if defined(__AVX2__)
        // Of loads with a mask GCC 12 makes a loop that stores a sum on the stack each time.
        if (0 < left && left < kWidth) return load_part<T>(from, left, readable);
#endif
        return load_first(from, left, readable);
      });
    for (int64_t c = 0; c < width; ++c) totals[c] += columns[c];
  }
}

// A single position: (y − bias)·dy, nothing to sum.
template <typename T>
void multiply(const T* y, const T* dy, const T* bias, int64_t n, typename Sum<T>::Scalar* out) {
  using V = typename Sum<T>::Vector;
  for (int64_t i = 0; i < n; i += Sum<T>::kWidth) {
    auto at = [&](const T* p) { return load_first(p + i, n - i, n - i); };
    const V terms = (at(y) - (bias ? at(bias) : V{})) * at(dy);
    std::memcpy(out + i, &terms, std::min<int64_t>(Sum<T>::kWidth, n - i) * sizeof(*out));
  }
}

template <typename T>
class Worker : public IndependentTasks {
 public:
  // `span`: channels of a task.
  Worker(const GateGradientsArgs& args, int64_t span) : args_(args), span_(span) {}

  void run(int64_t task) {
    const int64_t spans = (args_.channels + span_ - 1) / span_;
    const int64_t n = task / spans;
    const int64_t first = task % spans * span_;
    const int64_t last = std::min(first + span_, args_.channels);
    const int64_t example = n * args_.outer * args_.channels * args_.inner;
    const T* y = static_cast<const T*>(args_.output) + example;
    const T* dy = static_cast<const T*>(args_.grad_output) + example;
    S* out = static_cast<S*>(args_.out) + n * args_.channels;
    if (args_.inner == 1 && args_.outer == 1)
      return multiply(y + first, dy + first, bias() ? bias() + first : nullptr, last - first,
                      out + first);
    return bias() ? sum<true>(y, dy, out, n, first, last) : sum<false>(y, dy, out, n, first, last);
  }

 private:
  using V = typename Sum<T>::Vector;
  using S = typename Sum<T>::Scalar;

  const T* bias() const { return static_cast<const T*>(args_.bias); }

  // Channels [first, last) of example n, whose y, dy and out these are.
  template <bool kBias>
  void sum(const T* y, const T* dy, S* out, int64_t n, int64_t first, int64_t last) const {
    if (args_.inner == 1) {
      // Sums and biases of the channels side by side take half of sixteen registers.
      constexpr int kMost = std::min<int>(kBias ? 4 : 8, kChannels / Sum<T>::kWidth);
      for (int64_t c = first; c < last;)
        c += sum_side_by_side<kMost, kBias>(y + c, dy + c, bias() + c, last - c, out + c);
      return;
    }
    const int64_t example = args_.outer * args_.channels * args_.inner;
    const int64_t side = args_.inner <= kRun ? kRows : 1;  // long rows one after another
    S biases[kLanes] = {};
    for (int64_t c = first; c < last; c += side) {
      const int64_t rows = std::min(side, last - c), lane = (c - first) % kLanes;
      if (kBias && lane == 0) widen(bias() + c, last - c, args_.channels - c, biases);
      double totals[kRows] = {};
      for (int64_t a = 0; a < args_.outer; ++a) {
        const int64_t at = (a * args_.channels + c) * args_.inner;
        for (int64_t i = 0; i < args_.inner; i += kRun)
          sum_runs<kBias>(y + at + i, dy + at + i, biases + lane, args_.inner, rows,
                          std::min(kRun, args_.inner - i), (args_.batch - n) * example - (at + i),
                          totals);
      }
      std::copy_n(totals, rows, out + c);
    }
  }

  // As many of the `left` channels as kCount registers hold, fewer where fewer are left; how many.
  template <int kCount, bool kBias>
  int64_t sum_side_by_side(const T* y, const T* dy, const T* bias, int64_t left, S* out) const {
    constexpr int64_t kSide = kCount * Sum<T>::kWidth;
    if constexpr (kCount > 1)
      if (left < kSide) return sum_side_by_side<kCount / 2, kBias>(y, dy, bias, left, out);
    const int64_t width = std::min(kSide, left);
    double totals[kSide];
    sum_channels<kCount, kBias>(y, dy, bias, args_.channels, args_.outer, width, totals);
    std::copy_n(totals, width, out);
    return width;
  }

  GateGradientsArgs args_;
  int64_t span_;
};

template <typename T>
void run(const GateGradientsArgs& args, int threads) {
  const int64_t positions = args.outer * args.inner;
  int64_t span = std::max<int64_t>(kTaskElements / positions, 1);
  if (args.inner == 1) span = (span + kChannels - 1) / kChannels * kChannels;
  span = std::min(span, args.channels);
  const int64_t tasks = args.batch * ((args.channels + span - 1) / span);
  const int64_t elements = args.batch * args.channels * positions;
  threads = static_cast<int>(std::min<int64_t>(threads, elements / kThreadElements + 1));
  ordered_tasks(tasks, threads, [&] { return Worker<T>(args, span); });
}

}  // namespace

void gate_gradients(const GateGradientsArgs& args, int threads) {
  with_element_type(args.dtype,
                    [&](auto element) { run<typename decltype(element)::type>(args, threads); });
}

}  // namespace TK_ISA
}  // namespace tk
