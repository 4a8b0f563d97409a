#pragma once
#include "common.h"
#include "launching.h"
#include "lowrank_triton.h"

namespace peft_fused {

struct LowRankArguments {
  at::Tensor x, weight, add, bias, A, B, u, v, S;  // undefined where absent; A where S is given
  Control scale, rank, expert_a, expert_b;
  bool has_rank = false, has_expert_a = false, has_expert_b = false;
  Dropout dropout;
  bool frozen = false;
};

// Casts a call as autocast does.
void autocast(LowRankArguments& args);

// The key of a call, of which the controls that lie on the CPU are numbers from here on.
Key key_of(LowRankArguments& args);

using LowRankOnTriton = OnTriton<LowRankPlan>;

// The op and its autograd node, for a call that ops/lowrank.py has checked and decided to run here; by the kernels of
// Triton where these are given.
at::Tensor lowrank(const LowRankArguments& args, c10::intrusive_ptr<LowRankOnTriton> on_triton);

}  // namespace peft_fused
