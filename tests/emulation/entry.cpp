// The launchers with C linkage, for ctypes.
#include "conv2d_fisher.h"
#include "conv2d_fisher_plan.cuh"
#include "filter_moments.h"
#include "gate_gradients.h"
#include "hutchinson_moments.h"
#include "philox.h"
#include "rademacher.h"
#include "second_order_moments.h"

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

// Which kernel is chosen, and in how many splits of the examples it runs.
void fisher_plan(const tk::Conv2dFisherArgs* args, int64_t workspace_bytes, int64_t (&plan)[2]) {
  const tk::FisherPlan found = tk::plan_fisher(*args, workspace_bytes);
  plan[0] = static_cast<int64_t>(found.kernel);
  plan[1] = found.splits;
}

int64_t fisher_workspace(const tk::Conv2dFisherArgs* args) {
  return tk::conv2d_fisher_cuda_workspace(*args);
}

void fisher(const tk::Conv2dFisherArgs* args, void* workspace) {
  tk::conv2d_fisher_cuda(*args, workspace, nullptr);
}
}
