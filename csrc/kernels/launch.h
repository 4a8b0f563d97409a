// From tensors to the launchers of this folder: pointers, types, device guard and the current stream.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "lowrank.h"

namespace peft_fused {

// The stream is asked of torch generically, without torch's CUDA headers, which a CPU-only torch does not carry.
inline cudaStream_t current_stream(const at::Device& device) {
  return static_cast<cudaStream_t>(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle());
}

inline Type type_of(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat ? Type::f32 : t.scalar_type() == at::kHalf ? Type::f16 : Type::bf16;
}

inline void check_launch(cudaError_t error, const char* kernel) {
  TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

inline float keep_scale(int64_t threshold) {
  return static_cast<float>(65536.0 / (65536.0 - static_cast<double>(threshold)));
}

inline void launch_drop(const at::Tensor& in, const at::Tensor& seed, const at::Tensor& out, int64_t threshold,
                        int64_t first_row) {
  const c10::DeviceGuard guard(in.device());
  check_launch(drop(in.const_data_ptr(), out.mutable_data_ptr(), seed.const_data_ptr<int64_t>(), in.size(0),
                    in.size(1), first_row, static_cast<uint32_t>(threshold), keep_scale(threshold), type_of(in),
                    current_stream(in.device())),
               "drop");
}

}  // namespace peft_fused
