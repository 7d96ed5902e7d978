// The CPU kernels as each instruction set's translation units define them.
#pragma once

#include <cstdint>

#include "common/conv2d_fisher.h"
#include "common/filter_moments.h"
#include "common/gate_gradients.h"
#include "common/hutchinson_moments.h"
#include "common/rademacher.h"
#include "common/second_order_moments.h"

#ifndef TK_ISA
#define TK_ISA baseline
#endif

#define TK_DECLARE_CPU_KERNELS(isa)                                                               \
  namespace isa {                                                                                 \
  void conv2d_fisher(const Conv2dFisherArgs& args, int threads);                                  \
  void filter_moments(const ParameterItem* items, int64_t count, int threads);                    \
  void gate_gradients(const GateGradientsArgs& args, int threads);                                \
  void hutchinson_moments(const ParameterItem* items, int64_t count, int threads, uint64_t seed); \
  void rademacher(const RademacherItem* items, int64_t count, int threads, uint64_t seed);        \
  void second_order_moments(const ParameterItem* items, int64_t count, int threads);              \
  }
