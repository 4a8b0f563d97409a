// What the ops that launch Triton's kernels share, as triton_kernels/launching.py has it.
#pragma once
#include "common.h"

namespace peft_fused {

// A plan of an op for Triton's kernels. precision: of fp32 products, a word of triton_launch.
template <typename Plan>
struct OnTriton : torch::CustomClassHolder {
  Plan plan;
  int precision = 0;
};

inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels read vectors without a stride.
inline at::Tensor dense(const at::Tensor& vector) { return vector.defined() ? vector.contiguous() : vector; }

// A number for where there is a tensor: the default that Python's launchers have, for which nothing is compiled anew.
inline int64_t whole(const Control& control, int64_t instead = 0) {
  return control.tensor.defined() ? instead : static_cast<int64_t>(control.number);
}
inline double number(const Control& control) { return control.tensor.defined() ? 1.0 : control.number; }

// Strides of a factor [rows, columns] or of a stack of them; zeros for none.
struct Strides {
  int64_t expert = 0, row = 0, column = 0;
  Strides() = default;
  explicit Strides(const at::Tensor& factor) {
    if (!factor.defined()) return;
    expert = factor.dim() == 3 ? factor.stride(0) : 0;
    row = factor.stride(-2);
    column = factor.stride(-1);
  }
  Strides transposed() const {
    Strides other = *this;
    std::swap(other.row, other.column);
    return other;
  }
};

}  // namespace peft_fused
