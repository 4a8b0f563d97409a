#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace peft_fused {

// The plan and the tables of kernels/fft_plan.h; ValueError for a length that is not 5-smooth or out of range.
std::vector<int> fft_radices(int64_t length);
at::Tensor fft_twiddles(int64_t length);  // [length] complex64 on the CPU

// What kernels/fft.h computes, by the code of its kernels: the threads of each block in turn, on one CPU core, so that
// arithmetic and index maps are tested where there is no GPU. fp32 and complex64 CPU tensors, unit column strides.
struct FftHostOptions {
  std::optional<at::Tensor> seed;  // 0-d int64
  int64_t threshold = 0;
  double scale = 1;
  bool conjugate = false;
  bool backwards = false;  // the order of threads within a phase: without influence where there is no race
};
at::Tensor fft_convolve_host(const at::Tensor& x, const at::Tensor& khat, const at::Tensor& twiddles, int64_t n_out,
                             const std::optional<at::Tensor>& add, bool mask_output, const FftHostOptions& options);
// (dx, partial)
std::tuple<at::Tensor, at::Tensor> fft_correlate_host(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& khat,
                                                      const at::Tensor& twiddles, int64_t blocks,
                                                      const FftHostOptions& options);

}  // namespace peft_fused
