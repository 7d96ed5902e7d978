// The CPU kernel of gate_gradients; formula and layouts: gate_gradients.h. Compiled once per
// instruction set (TK_ISA); cpu/dispatch.cpp picks one at run time.
//
// Where an example's channels are rows (inner > 1), a channel is summed along memory; where the
// channel is innermost, channels are the lanes and positions run past them. A task is one
// example's span of channels, so no two tasks meet in an output.
#include "common/gate_gradients.h"

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

constexpr int64_t kRun = 2048;                // elements summed in float before a double takes over
constexpr int64_t kPositions = 256;           // the same down a column
constexpr int64_t kChannels = 4 * kLanes;     // channels side by side: four cache lines a position
constexpr int64_t kTaskElements = 32768;      // 256 KB of y and dy: 10 µs
constexpr int64_t kThreadElements = 1 << 18;  // under 100 µs of work a second thread costs more

// Σ (y − bias)·dy along n ≤ kRun contiguous elements, of `readable`.
template <typename T>
double sum_run(const T* y, const T* dy, typename Sum<T>::Vector bias, int64_t n, int64_t readable) {
  using V = typename Sum<T>::Vector;
  V sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    sum0 += (load(y + i) - bias) * load(dy + i);
    sum1 += (load(y + i + kLanes) - bias) * load(dy + i + kLanes);
    sum2 += (load(y + i + 2 * kLanes) - bias) * load(dy + i + 2 * kLanes);
    sum3 += (load(y + i + 3 * kLanes) - bias) * load(dy + i + 3 * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sum0 += (load(y + i) - bias) * load(dy + i);
  if (i < n) {  // masked last: the bias may be infinite
    const V tail = load_first(y + i, n - i, readable - i) - bias;
    sum1 += keep_first(tail * load_first(dy + i, n - i, readable - i), n - i);
  }
  return sum_lanes((sum0 + sum1) + (sum2 + sum3));
}

// Σ over `positions` rows of `stride` elements, for `width` ≤ kChannels adjacent channels.
template <typename T>
void sum_channels(const T* y, const T* dy, const T* bias, int64_t stride, int64_t positions,
                  int64_t width, double* totals) {
  using V = typename Sum<T>::Vector;
  const int64_t vectors = (width + kLanes - 1) / kLanes;
  auto at = [&](const T* p, int64_t v) {
    const int64_t rest = width - v * kLanes;
    return rest >= kLanes ? load(p + v * kLanes) : load_first(p + v * kLanes, rest);
  };
  V b[kChannels / kLanes] = {};
  if (bias)
    for (int64_t v = 0; v < vectors; ++v) b[v] = at(bias, v);
  std::fill_n(totals, kChannels, 0.0);
  for (int64_t begin = 0; begin < positions; begin += kPositions) {
    const int64_t end = std::min(begin + kPositions, positions);
    V sum[kChannels / kLanes] = {};
    if (width == kChannels) {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t v = 0; v < kChannels / kLanes; ++v)
          sum[v] += (load(y + p * stride + v * kLanes) - b[v]) * load(dy + p * stride + v * kLanes);
    } else {
      for (int64_t p = begin; p < end; ++p)
        for (int64_t v = 0; v < vectors; ++v)
          sum[v] += (at(y + p * stride, v) - b[v]) * at(dy + p * stride, v);
    }
    for (int64_t c = 0; c < width; ++c) totals[c] += sum[c / kLanes][c % kLanes];
  }
}

// A single position: (y − bias)·dy, nothing to sum.
template <typename T>
void multiply(const T* y, const T* dy, const T* bias, int64_t n, typename Sum<T>::Scalar* out) {
  using V = typename Sum<T>::Vector;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, n - i);
    auto at = [&](const T* p) { return width == kLanes ? load(p + i) : load_first(p + i, width); };
    const V terms = (at(y) - (bias ? at(bias) : V{})) * at(dy);
    std::memcpy(out + i, &terms, width * sizeof(*out));
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
    if (args_.inner == 1) {
      double totals[kChannels];
      for (int64_t c = first; c < last; c += kChannels) {
        const int64_t width = std::min(kChannels, last - c);
        sum_channels(y + c, dy + c, bias() ? bias() + c : nullptr, args_.channels, args_.outer,
                     width, totals);
        std::copy_n(totals, width, out + c);
      }
      return;
    }
    for (int64_t c = first; c < last; ++c) {
      const auto b = bias() ? splat<V>(load_first(bias() + c, 1)[0]) : V{};
      double total = 0;
      for (int64_t a = 0; a < args_.outer; ++a) {
        const int64_t at = (a * args_.channels + c) * args_.inner;
        for (int64_t i = 0; i < args_.inner; i += kRun)
          total += sum_run(
              y + at + i, dy + at + i, b, std::min(kRun, args_.inner - i),
              args_.batch * args_.outer * args_.channels * args_.inner - (example + at + i));
      }
      out[c] = total;
    }
  }

 private:
  using V = typename Sum<T>::Vector;
  using S = typename Sum<T>::Scalar;

  const T* bias() const { return static_cast<const T*>(args_.bias); }

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
