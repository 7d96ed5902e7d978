// The CPU kernels as each instruction set's translation units define them.
#pragma once

#include "common/ops.h"

#ifndef TK_ISA
#define TK_ISA baseline
#endif

#define TK_DECLARE_CPU_KERNEL(op, Call) void op(const Call& call, int threads);

#define TK_DECLARE_CPU_KERNELS(isa) \
  namespace isa {                   \
  TK_OPS(TK_DECLARE_CPU_KERNEL)     \
  }
