// Random signs from a counter, the same on every device: Philox4x32-10 of Salmon, Moraes, Dror and
// Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// The sign of element e of a tensor is bit e % 128 (of word e % 128 / 32) of the generator's output
// for the counter (low and high half of e / 128, stream, 0) and the key (low and high half of the
// seed); a set bit is a minus. The stream tells the tensors of a list apart.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace tk {

constexpr int kPhiloxRounds = 10;

TK_HOST_DEVICE inline void philox4x32(uint32_t (&counter)[4], uint64_t key) {
  auto low = static_cast<uint32_t>(key);
  auto high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ low;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ high;
    counter[3] = static_cast<uint32_t>(a);
    low += 0x9E3779B9;
    high += 0xBB67AE85;
  }
}

// The signs of the 128 elements from 128·block on.
TK_HOST_DEVICE inline void random_signs(uint32_t (&bits)[4], uint64_t seed, uint32_t stream,
                                        uint64_t block) {
  bits[0] = static_cast<uint32_t>(block);
  bits[1] = static_cast<uint32_t>(block >> 32);
  bits[2] = stream;
  bits[3] = 0;
  philox4x32(bits, seed);
}

// Those of `element` (the lowest bit) and what follows it in its 32.
TK_HOST_DEVICE inline uint32_t random_signs_at(uint64_t seed, uint32_t stream, uint64_t element) {
  uint32_t bits[4];
  random_signs(bits, seed, stream, element / 128);
  // Not bits[element / 32 % 4]: a GPU has no way to index registers.
  const uint32_t lower = element & 32 ? bits[1] : bits[0];
  const uint32_t upper = element & 32 ? bits[3] : bits[2];
  return (element & 64 ? upper : lower) >> (element & 31);
}

}  // namespace tk
