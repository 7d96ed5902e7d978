// The CUDA ops as a Python module for a CPU, with what tests want to know of their inside.
#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <thread>
#include <tuple>
#include <vector>

#include "bindings/cuda_ops.cpp"  // here, since every file that includes pybind11 takes seconds
#include "bindings/records.h"
#include "common/philox.h"
#include "cuda/conv2d_fisher/launch_plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

namespace py = pybind11;

// The kernel that is chosen, its splits of the examples, and the bytes of its workspace.
std::tuple<int, int64_t, int64_t> fisher_plan(py::handle record, int64_t workspace_bytes) {
  tk::Conv2dFisherArgs args;
  tk::read_call(record, args);
  const tk::FisherPlan plan = tk::plan_fisher(args, workspace_bytes);
  return {static_cast<int>(plan.kernel), plan.splits,
          plan.workspace_floats() * int64_t{sizeof(float)}};
}

// As planned for so much workspace. Returns how many loads were misaligned or outside of the
// tensors.
int fisher(py::handle record, int64_t workspace_bytes, py::handle workspace) {
  tk::Conv2dFisherArgs args;
  tk::read_call(record, args);
  const int64_t x = args.groups * args.channels * args.image.h * args.image.w;
  const int64_t dy = args.groups * args.filters * args.out_image.h * args.out_image.w;
  const int64_t weight = args.groups * args.filters * args.channels * args.kernel.h *
                         args.kernel.w * tk::size_of(args.weight_dtype);
  emulation::faults = 0;
  const tk::FisherPlan plan = tk::plan_fisher(args, workspace_bytes);
  void* room = tk::data_of(workspace);
  emulation::readable = {{args.input, args.batch * x * tk::size_of(args.dtype)},
                         {args.grad_output, args.batch * dy * tk::size_of(args.dtype)},
                         {args.weight, args.weight ? weight : 0},
                         {room, plan.workspace_floats() * int64_t{sizeof(float)}}};
  tk::run_fisher(plan, args, room, nullptr);
  emulation::run_pending();
  emulation::readable.clear();
  return emulation::faults;
}

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, uint64_t key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  tk::philox4x32(words, key);
  return {words[0], words[1], words[2], words[3]};
}

// (device, which kernel, bytes) for every time that a kernel's limit was set.
std::vector<std::tuple<int, uintptr_t, int>> shared_limits() {
  std::vector<std::tuple<int, uintptr_t, int>> found;
  for (const emulation::Limit& limit : emulation::limits) {
    found.emplace_back(limit.device, reinterpret_cast<uintptr_t>(limit.kernel), limit.bytes);
  }
  return found;
}

// Threads that all want to launch one kernel, which no other test has launched.
void allow_shared_on_threads(int threads, int bytes) {
  static char kernel;
  std::atomic<int> waiting{threads};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&] {
      --waiting;
      while (waiting) std::this_thread::yield();
      tk::allow_shared("test", &kernel, bytes);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  tk::define_set_dtypes(m);
  tk::define_cuda_ops(m);
  m.def("fisher_plan", &fisher_plan);
  m.def("fisher", &fisher);
  m.def("philox", &philox);
  m.def("set_tensor_core", [](int bits, int groups) { tk::tensor_core = {bits, groups}; });
  m.def("add_products", [](float sum, std::vector<float> a, std::vector<float> b) {
    return tk::add_products(sum, a.data(), b.data(), static_cast<int>(a.size()));
  });
  m.def("set_device", [](int device) { emulation::device = device; });
  m.def("set_function_error",
        [](int error) { emulation::function_error = static_cast<cudaError_t>(error); });
  m.def("take_last_error", [] { return static_cast<int>(cudaGetLastError()); });
  m.def("set_lax_waits", [](int groups) { emulation::lax_waits = groups; });
  m.def("set_skipped_barrier", [](int barrier) { emulation::skipped_barrier = barrier; });
  m.def("synchronize", &emulation::run_pending);
  m.def("set_ptx_version", [](int version) { emulation::ptx_version = version; });
  m.def("early_launches", [] { return emulation::early_launches; });
  m.def("set_shared_limit", [](int bytes) { emulation::shared_limit = bytes; });
  m.def("shared_limits", &shared_limits);
  m.def("launched_shared", [] { return emulation::launched_shared; });
  m.def("allow_shared_on_threads", &allow_shared_on_threads);
  m.def("random_signs_at", &tk::random_signs_at);
}
