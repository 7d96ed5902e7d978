// Every op, once: the kernels' declarations, the choice between instruction sets and the functions
// of the Python module are all made from TK_OPS.
//
// The ops over lists of parameters (parameter.h), which sum over the elements e of each output
// filter, of each input channel, or of both:
//   filter_moments        ( Σ gw, Σ (gw)², Σ |gw|, Σ w², Σ g² )
//   second_order_moments  ( Σ q, Σ q² )  with  q = w·(g − ½h),  h a Hessian-vector product Hv
//   hutchinson_moments    Σ w² z (Hz)
// w is a weight and g its gradient. z are the random signs of philox.h for the call's seed and the
// item's stream, of elements numbered as they are stored; they are drawn where they are needed,
// never read. What the other ops compute stands beside the struct of their call.
#pragma once

#include <cstdint>
#include <functional>

#include "common/conv2d_fisher.h"
#include "common/gate_gradients.h"
#include "common/global_threshold.h"
#include "common/mirror_step.h"
#include "common/parameter.h"
#include "common/rademacher.h"
#include "common/sparse_momentum.h"

// X(op, Call): the op's name, and the struct that describes a call of it.
#define TK_OPS(X)                           \
  X(conv2d_example_norms, Conv2dFisherArgs) \
  X(conv2d_fisher, Conv2dFisherArgs)        \
  X(filter_moments, ParameterList)          \
  X(gate_gradients, GateGradientsArgs)      \
  X(global_threshold, GlobalThresholdArgs)  \
  X(hutchinson_moments, ParameterList)      \
  X(mirror_step, MirrorList)                \
  X(rademacher, RademacherList)             \
  X(second_order_moments, ParameterList)    \
  X(sparse_momentum, SparseMomentumArgs)

namespace tk {

// Gives so many bytes of 256-byte-aligned memory of the current device, which last until all that
// was launched before they are given back has run.
using Allocate = std::function<void*(int64_t bytes)>;

// op_cpu runs on `threads` threads.
//
// op_cuda launches on `stream` of the current device and returns without waiting; it asks for
// workspace once, or not at all. dtype f64 is not supported on the GPU. Throws std::runtime_error
// on a launch error.
#define TK_DECLARE_OP(op, Call)                 \
  void op##_cpu(const Call& call, int threads); \
  void op##_cuda(const Call& call, const Allocate& allocate, void* stream);

TK_OPS(TK_DECLARE_OP)

}  // namespace tk
