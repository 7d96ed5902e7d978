// What an op reads of an element: one of each of its two or three tensors, or a third operand that
// comes from elsewhere.
#pragma once

#include <utility>

#include "cuda/task_table.h"
#include "cuda/vector_load.cuh"

namespace tk {

// The third operand of an op's add(), beside the elements of Task::a and Task::b.
enum class Operand {
  none,
  channel_bias,  // a value of the element's channel, Task::c; zero if that is null
  tensor,        // an element of Task::c
  random_sign,   // 1 or -1, from Task::stream and the element's place in the tensor
};

template <class Op>
constexpr bool kHasBias = Op::kOperand == Operand::channel_bias;

template <class Op>
constexpr int kTensors = Op::kOperand == Operand::tensor ? 3 : 2;

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
    if constexpr (Op::kOperand == Operand::random_sign) signs = op.signs(task.stream, first);
  }

  __device__ void add(float (&sums)[Op::kSums], int j, float bias) const {
    float c = bias;
    if constexpr (Op::kOperand == Operand::tensor) c = of[2][j];
    if constexpr (Op::kOperand == Operand::random_sign)
      c = __uint_as_float(0x3f800000u | signs >> j << 31);
    Op::add(sums, of[0][j], of[1][j], c);
  }
};

}  // namespace tk
