#pragma once
#include "common.h"

#include <string>

namespace peft_fused {

struct BottleneckArguments {
  at::Tensor h, down, down_bias, up, up_bias, residual;  // undefined where absent
  std::string activation;
  Control scale, expert_d, expert_u;  // an expert's tensor may be 1-D, with an index per group of rows
};

// The op and its autograd node (ops/bottleneck.py states the formula), on the CPU. An undefined tensor says that this
// node does not take the call: bad arguments, autocast, a tensor subclass, or another backend's turn.
at::Tensor bottleneck(const BottleneckArguments& args, const std::string& backend);

}  // namespace peft_fused
