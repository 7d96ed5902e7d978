// The launchers with C linkage, for ctypes.
#include <cuda_runtime.h>

#include "common/conv2d_fisher.h"
#include "cuda/conv2d_fisher/plan.cuh"
#include "common/filter_moments.h"
#include "common/gate_gradients.h"
#include "common/hutchinson_moments.h"
#include "common/philox.h"
#include "common/rademacher.h"
#include "common/second_order_moments.h"

extern "C" {

int64_t filter_moments_workspace(const tk::ParameterItem* items, int64_t count) {
  return tk::filter_moments_cuda_workspace(items, count);
}

void filter_moments(const tk::ParameterItem* items, int64_t count, void* workspace) {
  tk::filter_moments_cuda(items, count, workspace, nullptr);
}

int64_t second_order_moments_workspace(const tk::ParameterItem* items, int64_t count) {
  return tk::second_order_moments_cuda_workspace(items, count);
}

void second_order_moments(const tk::ParameterItem* items, int64_t count, void* workspace) {
  tk::second_order_moments_cuda(items, count, workspace, nullptr);
}

int64_t hutchinson_moments_workspace(const tk::ParameterItem* items, int64_t count) {
  return tk::hutchinson_moments_cuda_workspace(items, count);
}

void hutchinson_moments(const tk::ParameterItem* items, int64_t count, void* workspace,
                        uint64_t seed) {
  tk::hutchinson_moments_cuda(items, count, workspace, nullptr, seed);
}

void rademacher(const tk::RademacherItem* items, int64_t count, uint64_t seed) {
  tk::rademacher_cuda(items, count, nullptr, seed);
}

void philox(uint32_t (&counter)[4], uint64_t key) { tk::philox4x32(counter, key); }

uint32_t random_signs_at(uint64_t seed, uint32_t stream, uint64_t element) {
  return tk::random_signs_at(seed, stream, element);
}

int64_t gates_workspace(const tk::GateGradientsArgs* args) {
  return tk::gate_gradients_cuda_workspace(*args);
}

void gates(const tk::GateGradientsArgs* args, void* workspace) {
  tk::gate_gradients_cuda(*args, workspace, nullptr);
}

// The kernel that is chosen, its splits of the examples, and the bytes of its workspace.
void fisher_plan(const tk::Conv2dFisherArgs* args, int64_t workspace_bytes, int64_t (&found)[3]) {
  const tk::FisherPlan plan = tk::plan_fisher(*args, workspace_bytes);
  found[0] = static_cast<int64_t>(plan.kernel);
  found[1] = plan.splits;
  found[2] = plan.workspace_floats() * int64_t{sizeof(float)};
}

// As planned for so much workspace. Returns how many loads were misaligned or outside of the
// tensors.
int fisher(const tk::Conv2dFisherArgs* args, int64_t workspace_bytes, void* workspace) {
  const int64_t x = args->groups * args->channels * args->height * args->width;
  const int64_t dy = args->groups * args->filters * args->out_height * args->out_width;
  const int64_t weight = args->groups * args->filters * args->channels * args->kernel_h *
                         args->kernel_w * tk::size_of(args->weight_dtype);
  emulation::faults = 0;
  emulation::readable = {{args->x, args->batch * x * tk::size_of(args->dtype)},
                         {args->dy, args->batch * dy * tk::size_of(args->dtype)},
                         {args->weight, args->weight ? weight : 0}};
  tk::run_fisher(tk::plan_fisher(*args, workspace_bytes), *args, workspace, nullptr);
  emulation::readable.clear();
  return emulation::faults;
}
}
