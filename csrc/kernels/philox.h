// Philox-4x32-7 (Salmon et al. 2011), the dropout generator of every backend; the convention is in ops/dropout.py.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define PEFT_FUSED_HD __host__ __device__ __forceinline__
#else
#define PEFT_FUSED_HD inline
#endif

namespace peft_fused {

constexpr int kPhiloxRounds = 7;
constexpr int kElementsPerBlock = 8;

struct PhiloxBlock {
  uint32_t w[4];
};

// 128 random bits for elements 8 * block .. 8 * block + 7 of a row.
PEFT_FUSED_HD PhiloxBlock philox(uint64_t seed, uint32_t block, uint32_t row) {
  uint32_t c0 = block, c1 = row, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of element j of a block.
PEFT_FUSED_HD uint32_t element_bits(const PhiloxBlock& block, int j) {
  return (block.w[j >> 1] >> ((j & 1) * 16)) & 0xFFFFu;
}

}  // namespace peft_fused
