// The CUDA ops as a Python module for a CPU, with what tests want to know of their inside.
#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings/cuda_ops.h"
#include "bindings/records.h"
#include "common/philox.h"
#include "cuda/conv2d_fisher/launch_plan.cuh"

namespace {

namespace py = pybind11;

// The kernel that is chosen, its splits of the examples, and the bytes of its workspace.
std::tuple<int, int64_t, int64_t> fisher_plan(py::handle record, int64_t workspace_bytes) {
  const auto args = tk::read_record<tk::Conv2dFisherArgs>(record);
  const tk::FisherPlan plan = tk::plan_fisher(args, workspace_bytes);
  return {static_cast<int>(plan.kernel), plan.splits,
          plan.workspace_floats() * int64_t{sizeof(float)}};
}

// As planned for so much workspace. Returns how many loads were misaligned or outside of the
// tensors.
int fisher(py::handle record, int64_t workspace_bytes, py::handle workspace) {
  const auto args = tk::read_record<tk::Conv2dFisherArgs>(record);
  const int64_t x = args.groups * args.channels * args.image.h * args.image.w;
  const int64_t dy = args.groups * args.filters * args.out_image.h * args.out_image.w;
  const int64_t weight = args.groups * args.filters * args.channels * args.kernel.h *
                         args.kernel.w * tk::size_of(args.weight_dtype);
  emulation::faults = 0;
  emulation::readable = {{args.input, args.batch * x * tk::size_of(args.dtype)},
                         {args.grad_output, args.batch * dy * tk::size_of(args.dtype)},
                         {args.weight, args.weight ? weight : 0}};
  tk::run_fisher(tk::plan_fisher(args, workspace_bytes), args, tk::data_of(workspace), nullptr);
  emulation::readable.clear();
  return emulation::faults;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, uint64_t key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  tk::philox4x32(words, key);
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  tk::define_set_dtypes(m);
  tk::define_cuda_ops(m);
  m.def("fisher_plan", &fisher_plan);
  m.def("fisher", &fisher);
  m.def("philox", &philox);
  m.def("random_signs_at", &tk::random_signs_at);
}
