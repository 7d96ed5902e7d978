// Sums across the lanes of a warp, in an order that is fixed by the lanes' numbers.
#pragma once

namespace tk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the sums over its aligned group of `width` lanes, a power of two up to 32.
template <int N>
__device__ void add_across_lanes(float (&sums)[N], int width) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], distance);
  }
}

// Four rows of N sums over the warp at once: lane l gets those of row l / 8. Each of the first two
// steps hands half of what is left to the other half of the lanes, so the four rows cost
// 2N + N + 3N shuffles instead of the 20N of four separate sums.
template <int N>
__device__ void add_four_rows(const float (&rows)[4][N], float (&sums)[N]) {
  const int lane = threadIdx.x % kWarp;
  const bool upper = lane & 16;
  const bool odd = lane & 8;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float half[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float sent = upper ? rows[j][i] : rows[j + 2][i];
      const float kept = upper ? rows[j + 2][i] : rows[j][i];
      half[j] = kept + __shfl_xor_sync(kAllLanes, sent, 16);
    }
    const float sent = odd ? half[0] : half[1];
    const float kept = odd ? half[1] : half[0];
    sums[i] = kept + __shfl_xor_sync(kAllLanes, sent, 8);
  }
  add_across_lanes(sums, 8);
}

}  // namespace tk
