#pragma once
#include <ATen/core/Tensor.h>

namespace peft_fused {

// x [rows, columns] with dropped elements zero and kept ones scaled by 65536 / (65536 - threshold), a new tensor of x's
// dtype. Row i draws as row first_row + i. seed: 0-d int64 tensor on x's device.
at::Tensor drop(const at::Tensor& x, const at::Tensor& seed, int64_t threshold, int64_t first_row);

}  // namespace peft_fused
