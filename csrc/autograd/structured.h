#pragma once
#include "common.h"

#include <string>

namespace peft_fused {

enum class Structure { circulant, toeplitz, kronecker };
enum class Method { fft, dense, gemm };

// p, q: the parameters of the structure as ops/structured/maps.py takes them.
struct StructuredArguments {
  std::string kind;
  at::Tensor x, p, q, add;  // undefined where absent
  int64_t out_features = -1;  // -1 where the caller leaves them to the parameters
  Control scale;
  Dropout dropout;
  bool transposed = false;
};

// The key of a call, whose scale is a number from here on if it lies on the CPU.
Key key_of(StructuredArguments& args);

// What ops/structured/engine.py decided of a call.
struct StructuredPath {
  std::string p_name, q_name;  // what the caller calls p and q
  Structure structure;
  Method method;
  int64_t n = 0, length = 0;  // outputs; of the FFT
  at::Tensor matrix;          // the dense matrix [n, k], for Method::dense only
};

// add + scale * M drop(x) with its autograd node: transforms by torch's FFT on a CPU and by csrc/kernels/fft.cu on CUDA.
at::Tensor structured(const StructuredArguments& args, const StructuredPath& path);

}  // namespace peft_fused
