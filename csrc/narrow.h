// Products on a CPU in which one side has few columns: those of an adapter. Libraries are made for wide ones.
#pragma once
#include <ATen/core/Tensor.h>

namespace peft_fused::narrow {

// Whether these functions serve an adapter of this type and so many ranks beside rows such as x and rows of `others`
// columns: fp32 or bf16, which they convert as they read.
bool serves(const at::Tensor& x, int64_t others, at::ScalarType adapter, int64_t ranks);

// alpha * x p, in fp32: x [M, K], p [K, R] in fp32 of any strides.
at::Tensor times(const at::Tensor& x, const at::Tensor& p, double alpha);

// alpha * s^T x [R, K], or transposed, x^T s [K, R]; in fp32: the rows of s [M, R], in fp32, and of x [M, K] added up.
at::Tensor over_rows(const at::Tensor& s, const at::Tensor& x, double alpha, bool transposed = false);

// y [M, N] = onto + bias + alpha * s q with one rounding: s [M, R], q [R, N] in fp32; onto and bias in y's type, or
// undefined; onto may be y.
void add_product(const at::Tensor& y, const at::Tensor& onto, const at::Tensor& bias, const at::Tensor& s,
                 const at::Tensor& q, double alpha);

}  // namespace peft_fused::narrow
