// What an op reads of an element: one of each of its two or three tensors, or a third operand that
// comes from elsewhere.
#pragma once

#include <utility>

#include "cuda/load.cuh"
#include "cuda/task_table.h"

namespace tk {

// The operand of an op's add() beside the pair from Task::a and Task::b.
enum class Third {
  none,
  shift,   // a value of the element's channel, Task::c; zero if that is null
  tensor,  // an element of Task::c
  sign,    // 1 or -1, from Task::stream and the element's place in the tensor
};

template <class Op>
constexpr bool kShifts = Op::kThird == Third::shift;

template <class Op>
constexpr int kTensors = Op::kThird == Third::tensor ? 3 : 2;

// Counts the tensors: sm_80 spills registers where loops do.
template <class Op>
constexpr auto kEach = std::make_index_sequence<kTensors<Op>>();

// The tensors from one of their elements on.
template <class Op, class E>
struct Inputs {
  const typename E::Raw* from[kTensors<Op>];

  __device__ Inputs(const Task& task, int64_t begin) : Inputs(task, begin, kEach<Op>) {}

  template <class Offset>
  __device__ Inputs operator+(Offset offset) const {
    return Inputs(*this, offset, kEach<Op>);
  }

 private:
  template <size_t... T>
  __device__ Inputs(const Task& task, int64_t begin, std::index_sequence<T...>)
      : from{static_cast<const typename E::Raw*>(T == 0   ? task.a
                                                 : T == 1 ? task.b
                                                          : task.c) +
             begin...} {}

  template <class Offset, size_t... T>
  __device__ Inputs(const Inputs& other, Offset offset, std::index_sequence<T...>)
      : from{other.from[T] + offset...} {}
};

// Consecutive elements, of which `first` is the first, with their third operands.
template <class Op, class E, int N>
struct Elements {
  const Vector<E, N> (&of)[kTensors<Op>];
  uint32_t signs = 0;  // of one word: a vector starts at a multiple of its size

  __device__ Elements(const Op& op, const Task& task, const Vector<E, N> (&vectors)[kTensors<Op>],
                      int64_t first)
      : of(vectors) {
    if constexpr (Op::kThird == Third::sign) signs = op.signs(task.stream, first);
  }

  __device__ void add(float (&sums)[Op::kSums], int j, float shift) const {
    float c = shift;
    if constexpr (Op::kThird == Third::tensor) c = of[2][j];
    if constexpr (Op::kThird == Third::sign) c = __uint_as_float(0x3f800000u | signs >> j << 31);
    Op::add(sums, of[0][j], of[1][j], c);
  }
};

}  // namespace tk
