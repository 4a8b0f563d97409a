// The low-rank op by Triton's kernels: what triton_kernels/lowrank.py launches, launched from here.
#pragma once
#include "common.h"

namespace peft_fused {

// LowRankLaunch and LowRankPlan of triton_kernels/lowrank_plan.py.
struct LowRankLaunch {
  int64_t block_m = 0, block_n = 0, block_r = 0, num_warps = 0, num_stages = 0, block_k = 0, splits = 1, maxnreg = 0;
};

struct LowRankPlan {
  bool single_kernel = false, one_pass_b = false, fused_a = false;
  LowRankLaunch shrink, expand, linear, grad_b, dsu, db, grad_a;
  LowRankLaunch reduce;  // its block_r are all ranks, padded as those of S are, of all members
};

// A call as the kernels take it, settled: of a control the tensor where there is one, else the number.
struct LowRankTritonCall {
  at::Tensor x, weight, add, bias, A, B, u, v, seed;  // x and add by rows
  Control scale, rank, expert_a, expert_b;
  int64_t threshold = 0;
  bool frozen = false;
  int precision = 0;  // of fp32 products: a word of triton_launch
  at::Tensor S;       // [M, r or more] where it is given, in place of A and without dropout
};

// (y [M, N], S [M, R]).
std::pair<at::Tensor, at::Tensor> lowrank_triton_fwd(const LowRankTritonCall& call, const LowRankPlan& plan);

struct LowRankNeeds {
  bool x = false, weight = false, bias = false, A = false, B = false, u = false, v = false, S = false;
};

struct LowRankGrads {
  at::Tensor x, weight, bias, A, B, u, v, S;
};

// The gradients of `needs` from dY [M, N]. Of the call what none of them reads may be undefined, but for B. Where S was
// given, A is undefined, x's gradient is that of the base product alone, and that of S has its columns.
LowRankGrads lowrank_triton_bwd(const at::Tensor& dy, const LowRankTritonCall& call, const at::Tensor& S,
                                const LowRankNeeds& needs, const LowRankPlan& plan);

// Members of one product with x, and whether dropped out: factors [r_i, K], seeds int64 [members].
struct SharedShrinkTritonCall {
  at::Tensor x;
  std::vector<at::Tensor> factors;
  at::Tensor seeds;
  int64_t threshold = 0;
  int precision = 0;
};

// S_i [M, R] for each factor. Its plan is one of so many members.
std::vector<at::Tensor> shared_shrink_triton_fwd(const SharedShrinkTritonCall& call, const LowRankPlan& plan);

struct SharedShrinkGrads {
  at::Tensor x;
  std::vector<at::Tensor> factors;
};

// Of the dS_i [M, R] that are defined. x is added to `onto`, which may be overwritten; needs: of each factor. See
// shared_shrink_bwd of lowrank.py.
SharedShrinkGrads shared_shrink_triton_bwd(const std::vector<at::Tensor>& grads, const at::Tensor& onto,
                                           const SharedShrinkTritonCall& call, bool need_x,
                                           const std::vector<bool>& needs, const LowRankPlan& plan);

}  // namespace peft_fused
