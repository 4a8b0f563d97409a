#pragma once
#include <vector>

#include "common.h"
#include "lowrank.h"

namespace peft_fused {

struct SharedShrinkArguments {
  at::Tensor x;
  std::vector<at::Tensor> factors;
  Dropout dropout;  // without a seed: every factor has its own
  int64_t out_features = 0;
};

void autocast(SharedShrinkArguments& args);

Key key_of(SharedShrinkArguments& args);

// The op of ops/shared_shrink.py and its autograd node: {x, S of every factor}, where a layer takes its x from here, so
// that what it gives as the gradient of x comes through this node.
std::vector<at::Tensor> shared_shrink(const SharedShrinkArguments& args, c10::intrusive_ptr<LowRankOnTriton> on_triton);

// Whether backward has run through the node that made this S, which may have freed what it kept.
bool shared_shrink_ran(const at::Tensor& S);

}  // namespace peft_fused
