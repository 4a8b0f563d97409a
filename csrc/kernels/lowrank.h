// CUDA kernels of the low-rank op, on raw pointers and a stream. No torch header may be included here: these files
// compile with nvcc beside a CPU-only torch.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_fused {

enum class Type { f32, f16, bf16 };

// A number, or the same in device memory, so that a CUDA graph replays it with another value.
struct IntControl {
  const int64_t* pointer;
  int64_t value;
};

// S [m, r] = keep_rank(A[expert] drop(x)), contiguous, in A's type.
struct ShrinkParams {
  const void* x;  // [m, k], row stride x_row, unit column stride
  const void* A;  // [experts, r, k]: strides a_expert, a_row, unit
  void* S;        // [m, r]
  const int64_t* seed;  // null without dropout
  int64_t m, k, x_row, a_expert, a_row;
  int r;
  uint32_t threshold;
  float keep_scale;
  IntControl rank, expert;
  Type x_type, a_type;  // a_type is x_type or f32
};
cudaError_t shrink(const ShrinkParams& params, cudaStream_t stream);

// out = drop(x), both [rows, columns] contiguous; row i draws as row first_row + i.
cudaError_t drop(const void* x, void* out, const int64_t* seed, int64_t rows, int64_t columns, int64_t first_row,
                 uint32_t threshold, float keep_scale, Type type, cudaStream_t stream);

}  // namespace peft_fused
