#pragma once
#include "common.h"

namespace peft_fused {

struct LowRankArguments {
  at::Tensor x, weight, add, bias, A, B, u, v;  // undefined where absent
  Control scale, rank, expert_a, expert_b;
  bool has_rank = false, has_expert_a = false, has_expert_b = false;
  Dropout dropout;
  bool frozen = false;
};

// The key of a call, of which the controls that lie on the CPU are numbers from here on.
Key key_of(LowRankArguments& args);

// The op and its autograd node, for a call that ops/lowrank.py has checked and decided to run here.
at::Tensor lowrank(const LowRankArguments& args);

}  // namespace peft_fused
