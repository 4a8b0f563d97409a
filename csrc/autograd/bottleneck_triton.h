// The bottleneck op by Triton's kernels: what triton_kernels/bottleneck.py launches, launched from here.
#pragma once
#include <vector>

#include "common.h"

namespace peft_fused {

// RowsLaunch, GradLaunch and BottleneckPlan of triton_kernels/bottleneck_plan.py. maxnreg: 0 where it is the compiler's.
struct BottleneckRowsLaunch {
  bool shrink = false, expand = false;
  int64_t block_m = 0, block_k = 0, block_n = 0, block_r = 0, num_warps = 0, num_stages = 0, maxnreg = 0, splits = 1;
};
struct BottleneckGradLaunch {
  int64_t block_m = 0, block_x = 0, block_r = 0, num_warps = 0, num_stages = 0, maxnreg = 0, splits = 1;
};
struct BottleneckPlan {
  std::vector<BottleneckRowsLaunch> forward, backward;
  BottleneckGradLaunch grad_down, grad_up;
  int64_t reduce_p = 0, reduce_x = 0, reduce_r = 0, reduce_warps = 0;  // of the second stage: partials, columns, units
};

// A call as the kernels take it, settled: of a control the tensor where there is one, else the number.
struct BottleneckTritonCall {
  at::Tensor h, down, down_bias, up, up_bias, residual;  // h and residual by rows
  Control scale, expert_d, expert_u;
  int activation = 0, precision = 0;  // words of triton_launch
};

// (y [M, N], z [M, r]).
std::pair<at::Tensor, at::Tensor> bottleneck_triton_fwd(const BottleneckTritonCall& call, const BottleneckPlan& plan);

struct BottleneckNeeds {
  bool h = false, down = false, down_bias = false, up = false, up_bias = false;
};

struct BottleneckGrads {
  at::Tensor h, down, down_bias, up, up_bias;
};

// Of the parameters, which backward may come without: sizes of a stack (0: none) and type.
struct BottleneckShape {
  int64_t stack_d = 0, stack_u = 0, r = 0, k = 0, n = 0;
  at::ScalarType type = at::kFloat;
  bool residual_is_h = false;
};

// The gradients of `needs` from dY [M, N]. Of the call what none of them reads may be undefined.
BottleneckGrads bottleneck_triton_bwd(const at::Tensor& dy, const BottleneckTritonCall& call, const at::Tensor& z,
                                      const BottleneckShape& shape, const BottleneckNeeds& needs,
                                      const BottleneckPlan& plan);

}  // namespace peft_fused
