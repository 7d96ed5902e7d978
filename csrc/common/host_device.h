// Marks what both the CPU and the CUDA code call.
#pragma once

#ifdef __CUDACC__
#define TK_HOST_DEVICE __host__ __device__
#else
#define TK_HOST_DEVICE
#endif
