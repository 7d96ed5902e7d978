#include <cuda_runtime.h>

#include "cuda/device_check.h"

namespace tk {
namespace {

// It is compiled for the same architectures as all others, so they run where this one does.
__global__ void any_kernel() {}

}  // namespace

std::string cuda_device_problem() {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clears it, or the next launch would report it
  const std::string text = cudaGetErrorString(error);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "they are compiled for other GPUs (" + text + ")";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "the driver is too old for them (" + text + ")";
    default:
      return text;
  }
}

}  // namespace tk
