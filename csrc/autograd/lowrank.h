#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace peft_fused {

// A runtime value of the op: a number, or a 0-d tensor.
struct Control {
  at::Tensor tensor;
  double number = 0;
};

struct LowRankArguments {
  at::Tensor x, weight, add, bias, A, B, u, v;  // undefined where absent
  Control scale, rank, expert_a, expert_b;
  bool has_rank = false, has_expert_a = false, has_expert_b = false;
  double dropout_p = 0;
  std::optional<int64_t> seed;
  at::Tensor seed_tensor;
  bool frozen = false;
};

// What Python's dispatch knows about this machine and tells once.
struct LowRankSettings {
  bool onednn = false;          // fp32 base products go to oneDNN
  int64_t onednn_least = 0;     // from this many multiply-adds on
  double launch_bound = 0;      // on CUDA, without a forced backend, only below this many multiply-adds
};
LowRankSettings& lowrank_settings();

// The op and its autograd node (ops/lowrank.py states the formula). An undefined tensor says that this node does not
// take the call: bad arguments, autocast, a tensor subclass, or another backend's turn. Python finds out which.
at::Tensor lowrank(LowRankArguments args, const std::string& backend);

}  // namespace peft_fused
