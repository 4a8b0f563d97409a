#pragma once
#include <ATen/core/Tensor.h>

namespace peft_fused {

// A seed as the kernels read it. ValueError unless it is a 0-d int64 tensor on this device and the threshold in 0..65535.
at::Tensor seed_of(const at::Tensor& seed, int64_t threshold, const at::Device& device);

// x [rows, columns] with dropped elements zero and kept ones scaled by 65536 / (65536 - threshold), a new tensor of x's
// dtype. Row i draws as row first_row + i. seed: 0-d int64 tensor on x's device. ValueError or TypeError for anything
// else.
at::Tensor drop(const at::Tensor& x, const at::Tensor& seed, int64_t threshold, int64_t first_row);

// The same in place, for a contiguous tensor of the extension's own. ValueError for a seed that is none.
at::Tensor drop_(const at::Tensor& own, const at::Tensor& seed, int64_t threshold, int64_t first_row);

}  // namespace peft_fused
