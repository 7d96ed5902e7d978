// The CPU kernel of conv2d_fisher; formula and layouts: conv2d_fisher.h. Compiled once per
// instruction set (TK_ISA); cpu/dispatch.cpp picks one at run time.
//
// A chunk of examples (some megabytes of them, or one) is packed into panels, which bounds the
// memory and makes one layout of two, but for what lies as panels do already, such as tokens of few
// channels; then tiles of the weight run over it. A tile sums the products of one tap in registers
// over the positions of an example, those alone for which the tap lies inside of the image, and
// adds the squares to sums that stay in L1 for all of the chunk. Then they go to the output; or, as
// Σ w²·sum is linear in them, to one partial sum for each filter and task, so that nothing of the
// weight's size is written. Tasks are tiles, never examples: no two of them meet in a sum.
//
// Measured (Zen 5, AVX-512, one thread): 3x3 layers of 64 to 256 channels run at 0.7 to 0.85 of
// the processor's multiply-adds, in 0.6 to 1 of the time of PyTorch's weight gradient of the batch.
// Stems and layers of few channels are bound by reading and packing x and dy, late layers of a
// pixel or four by the squares and by writing the output, or reading the weight. Read in place,
// tokens of 64 channels take a quarter of the time that they take packed, 3x3 layers 0.85 of it;
// beyond 2 KB a position packing is the faster.
#include "common/conv2d_fisher.h"

#include <vector>

#include "cpu/conv2d_fisher/blocking.h"
#include "cpu/conv2d_fisher/pack_tasks.h"
#include "cpu/conv2d_fisher/sum_tasks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tk {
inline namespace TK_ISA {
namespace {

template <typename T>
void run(const Conv2dFisherArgs& args, int threads) {
  using S = typename Sum<T>::Scalar;
  const Blocking<S> blocking(args, threads);
  const int64_t filters = args.groups * args.filters, slots = blocking.slots();
  std::vector<double> partials(args.weight ? filters * slots : 0);
  for_each_packed_chunk<T>(blocking, [&](const Chunk<S>& chunk) {
    ordered_tasks(blocking.tasks(), blocking.threads,
                  [&] { return Summer<T>(blocking, chunk, partials.data()); });
  });
  if (!args.weight) return;
  for (int64_t f = 0; f < filters; ++f) {
    double total = 0;
    for (int64_t s = 0; s < slots; ++s) total += partials[f * slots + s];
    static_cast<S*>(args.out)[f] = total;
  }
}

}  // namespace

void conv2d_fisher(const Conv2dFisherArgs& args, int threads) {
  with_element_type(args.dtype,
                    [&](auto element) { run<typename decltype(element)::type>(args, threads); });
}

}  // namespace TK_ISA
}  // namespace tk
