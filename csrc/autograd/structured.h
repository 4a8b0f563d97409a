#pragma once
#include "common.h"

#include <string>

namespace peft_fused {

enum class Structure { circulant, toeplitz, kronecker };
enum class Method { fft, dense, gemm };

// A call whose arguments Python has checked and planned (ops/structured/engine.py). p, q: the parameters of the
// structure as ops/structured/maps.py takes them.
struct StructuredArguments {
  std::string p_name, q_name;  // what the caller calls p and q
  at::Tensor x, p, q, add;  // undefined where absent
  at::Tensor matrix;        // the dense matrix [n, k], for Method::dense only
  at::Tensor seed;          // 0-d int64, defined if threshold > 0
  Control scale;
  Structure structure;
  Method method;
  int64_t n = 0, length = 0, threshold = 0;  // outputs; of the FFT; of dropout
};

// add + scale * M drop(x) with its autograd node: transforms by torch's FFT on a CPU and by csrc/kernels/fft.cu on CUDA.
at::Tensor structured(const StructuredArguments& args);

}  // namespace peft_fused
