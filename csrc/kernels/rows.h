// Rows in global memory, eight elements at a time: 16-byte accesses, fp32 arithmetic, dropout. Device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "philox.h"

#define PEFT_FUSED_DEVICE __device__ __forceinline__
#define PEFT_FUSED_UNROLL _Pragma("unroll")

namespace peft_fused {

constexpr int kVector = kElementsPerBlock;

PEFT_FUSED_DEVICE float widen(float v) { return v; }
template <typename T>
PEFT_FUSED_DEVICE T narrow(float v);
template <>
PEFT_FUSED_DEVICE float narrow<float>(float v) { return v; }
PEFT_FUSED_DEVICE float widen(__half v) { return __half2float(v); }
PEFT_FUSED_DEVICE float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
template <>
PEFT_FUSED_DEVICE __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
PEFT_FUSED_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T>
struct alignas(16) Packed {
  T v[16 / sizeof(T)];
};

template <typename T>
PEFT_FUSED_DEVICE bool vector_aligned(const T* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// kVector elements of a row from `column` on, zero past its end; 16-byte loads where the row's alignment allows.
template <typename T>
PEFT_FUSED_DEVICE void load_row(const T* row, int64_t column, int64_t columns, bool aligned, float (&out)[kVector]) {
  if (aligned && column + kVector <= columns) {
    constexpr int per = 16 / sizeof(T);
    PEFT_FUSED_UNROLL
    for (int i = 0; i < kVector / per; ++i) {
      const Packed<T> p = *reinterpret_cast<const Packed<T>*>(row + column + i * per);
      PEFT_FUSED_UNROLL
      for (int j = 0; j < per; ++j) out[i * per + j] = widen(p.v[j]);
    }
  } else {
    PEFT_FUSED_UNROLL
    for (int j = 0; j < kVector; ++j) out[j] = column + j < columns ? widen(row[column + j]) : 0.f;
  }
}

// The inverse of load_row.
template <typename T>
PEFT_FUSED_DEVICE void store_row(T* row, int64_t column, int64_t columns, bool aligned, const float (&v)[kVector]) {
  if (aligned && column + kVector <= columns) {
    constexpr int per = 16 / sizeof(T);
    PEFT_FUSED_UNROLL
    for (int i = 0; i < kVector / per; ++i) {
      Packed<T> p;
      PEFT_FUSED_UNROLL
      for (int j = 0; j < per; ++j) p.v[j] = narrow<T>(v[i * per + j]);
      *reinterpret_cast<Packed<T>*>(row + column + i * per) = p;
    }
  } else {
    PEFT_FUSED_UNROLL
    for (int j = 0; j < kVector; ++j)
      if (column + j < columns) row[column + j] = narrow<T>(v[j]);
  }
}

PEFT_FUSED_DEVICE void apply_keep(float (&v)[kVector], uint64_t seed, int64_t column, int64_t row, uint32_t threshold,
                                  float keep_scale) {
  const PhiloxBlock block = philox(seed, static_cast<uint32_t>(column / kVector), static_cast<uint32_t>(row));
  PEFT_FUSED_UNROLL
  for (int j = 0; j < kVector; ++j) v[j] = element_bits(block, j) >= threshold ? v[j] * keep_scale : 0.f;
}

}  // namespace peft_fused
