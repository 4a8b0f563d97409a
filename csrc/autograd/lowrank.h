#pragma once
#include "common.h"

#include <optional>
#include <string>

namespace peft_fused {

struct LowRankArguments {
  at::Tensor x, weight, add, bias, A, B, u, v;  // undefined where absent
  Control scale, rank, expert_a, expert_b;
  bool has_rank = false, has_expert_a = false, has_expert_b = false;
  double dropout_p = 0;
  std::optional<int64_t> seed;
  at::Tensor seed_tensor;
  bool frozen = false;
};

// Whether this node is the one for a problem, with a forced backend or "" for none: the rule that the op follows, and
// that ops/dispatch.py asks to tell which path a problem takes. uv: whether there is u or v; multiply_adds: of the base
// product.
bool lowrank_serves(bool cuda, at::ScalarType type, at::ScalarType adapter, bool uv, double multiply_adds,
                    const std::string& backend);

// The op and its autograd node (ops/lowrank.py states the formula). An undefined tensor says that this node does not
// take the call: bad arguments, autocast, a tensor subclass, or another backend's turn. Python finds out which.
at::Tensor lowrank(LowRankArguments args, const std::string& backend);

}  // namespace peft_fused
