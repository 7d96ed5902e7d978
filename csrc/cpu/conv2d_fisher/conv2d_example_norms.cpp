// The CPU kernel of conv2d_example_norms; formula and layouts: conv2d_fisher.h.
//
// It runs as conv2d_fisher.cpp does. But what a tile's products over an example give is squared and
// added up over the tile, in the registers that they were summed in, so that neither a gradient nor
// a sum of the weight's size is written: a task leaves one number for an example.
#include <algorithm>
#include <vector>

#include "common/conv2d_fisher.h"
#include "cpu/conv2d_fisher/blocking.h"
#include "cpu/conv2d_fisher/norm_tasks.h"
#include "cpu/conv2d_fisher/pack_tasks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
void run(const Conv2dFisherArgs& args, int threads) {
  using S = typename Sum<T>::Scalar;
  const Blocking<S> blocking(args, threads, true);
  const int64_t tasks = blocking.tasks();
  std::vector<double> partials(blocking.chunk * tasks);
  for_each_packed_chunk<T>(blocking, [&](const Chunk<S>& chunk) {
    std::fill(partials.begin(), partials.end(), 0.0);
    ordered_tasks(tasks, blocking.threads,
                  [&] { return NormSummer<T>(blocking, chunk, partials.data()); });
    for (int64_t n = 0; n < chunk.examples; ++n) {
      double total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += partials[n * tasks + task];
      static_cast<S*>(args.out)[chunk.first + n] = total;
    }
  });
}

}  // namespace

void conv2d_example_norms(const Conv2dFisherArgs& args, int threads) {
  with_element_type(args.dtype,
                    [&](auto element) { run<typename decltype(element)::type>(args, threads); });
}

}  // namespace TK_ISA
}  // namespace tk
