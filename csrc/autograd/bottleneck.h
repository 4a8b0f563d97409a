#pragma once
#include "common.h"

#include <string>

namespace peft_fused {

struct BottleneckArguments {
  at::Tensor h, down, down_bias, up, up_bias, residual;  // undefined where absent
  std::string activation;
  Control scale, expert_d, expert_u;  // an expert's tensor may be 1-D, with an index per group of rows
  bool has_expert_d = false, has_expert_u = false;
};

// Casts a call as autocast does.
void autocast(BottleneckArguments& args);

// The key of a call, of which the controls that lie on the CPU are numbers from here on, but for an index per group.
Key key_of(BottleneckArguments& args);

// The op and its autograd node, on the CPU, for a call that ops/bottleneck.py has checked and decided to run here.
at::Tensor bottleneck(const BottleneckArguments& args);

}  // namespace peft_fused
