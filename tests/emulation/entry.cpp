// The launchers with C linkage, for ctypes.
#include "filter_moments.h"
#include "gate_gradients.h"

extern "C" {

int64_t moments_workspace(const tk::ParameterItem* items, int64_t count) {
  return tk::filter_moments_cuda_workspace(items, count);
}

void moments(const tk::ParameterItem* items, int64_t count, void* workspace) {
  tk::filter_moments_cuda(items, count, workspace, nullptr);
}

int64_t gates_workspace(const tk::GateGradientsArgs* args) {
  return tk::gate_gradients_cuda_workspace(*args);
}

void gates(const tk::GateGradientsArgs* args, void* workspace) {
  tk::gate_gradients_cuda(*args, workspace, nullptr);
}
}
