// Devices, errors and launches of the emulated runtime. Only cuda_runtime.h includes this.
#pragma once

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};

namespace emulation {

inline int device = 0;                            // the current one
inline cudaError_t function_error = cudaSuccess;  // what it says of every kernel
inline int ptx_version = 90;                      // that they were compiled for
inline cudaError_t last_error = cudaSuccess;

// The dynamic shared memory that a kernel may have on a device, as often as it was set.
struct Limit {
  int device;
  const void* kernel;
  int bytes;
};
inline std::vector<Limit> limits;
inline int shared_limit = 163 << 10;      // of a block, on every device: an A100's
inline std::vector<int> launched_shared;  // bytes of every launch

inline int limit_of(const void* kernel) {
  int bytes = 48 << 10;
  for (const Limit& limit : limits) {
    if (limit.device == device && limit.kernel == kernel) bytes = limit.bytes;
  }
  return bytes;
}

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an emulated error";
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::shared_limit;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulation::limits.push_back({emulation::device, kernel, bytes});
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = emulation::ptx_version;
  return emulation::last_error = emulation::function_error;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = emulation::ptx_version;
  return emulation::last_error = emulation::function_error;
}

namespace emulation {

// The kernel that was launched last has not run yet: one that is launched early meets the memory
// that was there before it, until it waits.
inline std::function<void()> pending;
inline int early_launches = 0;

inline void run_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  blockDim = config.blockDim;
  body = std::move(kernel);
  for (blockIdx.x = 0; blockIdx.x < config.gridDim.x; ++blockIdx.x) {
    run_block(config.dynamicSmemBytes);
  }
}

inline void run_pending() {
  if (pending) std::exchange(pending, nullptr)();
}

// In the midst of a block of another kernel, which goes on as if nothing had been.
inline void run_pending_inside() {
  const auto place = std::make_tuple(blockIdx, threadIdx, blockDim, arrived);
  auto around = std::make_tuple(std::exchange(fibers, {}), std::exchange(body, nullptr),
                                std::exchange(dynamic_shared, {}));
  Barrier barriers[32];
  std::swap_ranges(barriers, barriers + 32, warp_barriers);
  jmp_buf back;
  std::memcpy(&back, &scheduler, sizeof(jmp_buf));
  arrived = 0;
  run_pending();
  std::memcpy(&scheduler, &back, sizeof(jmp_buf));
  std::swap_ranges(barriers, barriers + 32, warp_barriers);
  std::tie(fibers, body, dynamic_shared) = std::move(around);
  std::tie(blockIdx, threadIdx, blockDim, arrived) = place;
}

// The other lanes come first, up to here.
inline void wait_for_last_kernel() {
  if (pending) yield();
  if (pending) run_pending_inside();
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const auto shared = static_cast<int>(config->dynamicSmemBytes);
  emulation::launched_shared.push_back(shared);
  if (shared > emulation::limit_of(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  const bool early = config->numAttrs > 0;
  emulation::early_launches += early;
  if (!early) emulation::run_pending();
  const auto run = [kernel, config = *config, parameters = std::make_tuple(arguments...)] {
    emulation::run_grid(config, [&] { std::apply(kernel, parameters); });
  };
  if (early) {
    run();
    if (emulation::pending) throw std::runtime_error("a kernel launched early did not wait");
  } else {
    emulation::pending = run;
  }
  return cudaSuccess;
}
