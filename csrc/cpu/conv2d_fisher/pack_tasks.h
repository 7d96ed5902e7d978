// The tasks of conv2d_fisher on the CPU that pack a chunk of examples into panels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/conv2d_fisher/blocking.h"
#include "cpu/conv2d_fisher/packing.h"
#include "cpu/parallel.h"

namespace tk {
inline namespace TK_ISA {

// Examples packed together, and their panels: [gang][block][example][position][width] of a and b,
// nothing for what is read in place.
template <typename S>
struct Chunk {
  int64_t first, examples;
  S *a, *b;
};

// A task is some examples of one panel of one factor.
template <typename T>
class Packer : public IndependentTasks {
 public:
  using S = typename Sum<T>::Scalar;

  Packer(const Blocking<S>& blocking, const Chunk<S>& chunk)
      : blocking_(&blocking), chunk_(chunk) {}

  static int64_t tasks(const Blocking<S>& blocking, const Factor& f, int64_t examples) {
    return f.in_place ? 0 : blocking.panels(f) * ceil_div(examples, task_examples(f));
  }

  void run(int64_t task) {
    const int64_t of_a = tasks(*blocking_, blocking_->a, chunk_.examples);
    if (task < of_a)
      run(blocking_->a, task, chunk_.a);
    else
      run(blocking_->b, task - of_a, chunk_.b);
  }

 private:
  static int64_t task_examples(const Factor& f) {
    return std::max<int64_t>(kPackElements / f.panel_size(), 1);
  }

  void run(const Factor& f, int64_t task, S* panels) {
    const int64_t step = task_examples(f), parts = ceil_div(chunk_.examples, step);
    const int64_t panel = task / parts;
    const Range examples = part(task % parts, step, chunk_.examples);
    for (int64_t n = examples.begin; n < examples.end; ++n)
      pack<T>(f, chunk_.first + n, panel / f.blocks() * f.gang, panel % f.blocks(),
              panels + (panel * blocking_->chunk + n) * f.panel_size());
  }

  const Blocking<S>* blocking_;
  Chunk<S> chunk_;
};

// Packs one chunk of examples after the other, and calls sum(chunk) with each.
template <typename T, class EachChunk>
void for_each_packed_chunk(const Blocking<typename Sum<T>::Scalar>& blocking,
                           const EachChunk& sum) {
  using S = typename Sum<T>::Scalar;
  // In one piece and not cleared: of two the allocator gave the pages back after each call, and to
  // fault them in anew took up to a tenth of the time.
  constexpr std::align_val_t kAlignment{kRegisterBytes};
  auto release = [](S* p) { ::operator delete(p, kAlignment); };
  const std::unique_ptr<S, decltype(release)> panels(
      static_cast<S*>(::operator new(
          (blocking.chunk_size(blocking.a) + blocking.chunk_size(blocking.b)) * sizeof(S),
          kAlignment)),
      release);
  const int64_t batch = blocking.args.batch;
  for (int64_t first = 0; first < batch; first += blocking.chunk) {
    const int64_t examples = std::min(blocking.chunk, batch - first);
    const Chunk<S> chunk = {first, examples, panels.get() + blocking.chunk_size(blocking.b),
                            panels.get()};
    ordered_tasks(Packer<T>::tasks(blocking, blocking.a, examples) +
                      Packer<T>::tasks(blocking, blocking.b, examples),
                  blocking.threads, [&] { return Packer<T>(blocking, chunk); });
    sum(chunk);
  }
}

}  // namespace TK_ISA
}  // namespace tk
