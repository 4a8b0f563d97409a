#pragma once
#include "bottleneck_triton.h"
#include "common.h"
#include "launching.h"

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

// What the kernels are compiled for of an activation: a word of triton_launch. ValueError for an unknown name.
int activation_word(const std::string& name);

using BottleneckOnTriton = OnTriton<BottleneckPlan>;

// The op and its autograd node, for a call that ops/bottleneck.py has checked and decided to run here: on the CPU, or by
// the kernels of Triton where these are given.
at::Tensor bottleneck(const BottleneckArguments& args, c10::intrusive_ptr<BottleneckOnTriton> on_triton);

}  // namespace peft_fused
