// The low-rank products of several layers with the x that they share, as one autograd node: ops/shared_shrink.py in C++.
#include "shared_shrink.h"

#include <algorithm>
#include <atomic>

#include "../dropout.h"
#include "../memory.h"
#include "../narrow.h"

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SharedShrinkCall : torch::CustomClassHolder {
  int64_t threshold = 0;
  bool grad = false;
  bool passes_x = false;  // whether x is an output too
  std::atomic<bool> ran = false;  // backward
  at::ScalarType x_type = at::kFloat;
  std::vector<int64_t> sizes;  // of x
  c10::intrusive_ptr<LowRankOnTriton> on_triton;
};

SharedShrinkTritonCall triton_call(const Tensor& x2, std::vector<Tensor> factors, const Tensor& seeds,
                                   const SharedShrinkCall& c) {
  return {x2, std::move(factors), seeds, c.threshold, c.on_triton->precision};
}

Tensor seed_of_factor(const Tensor& seeds, size_t i) {
  return seeds.defined() ? seeds.select(0, static_cast<int64_t>(i)) : seeds;
}

// A block of rows of x as its products take it: in the factors' type where they do not convert it themselves.
class Block {
 public:
  Block() = default;
  Block(const Tensor& rows, int64_t first_row, at::ScalarType type, bool narrow, int64_t threshold)
      : rows_(narrow && threshold == 0 ? rows : rows.to(type)), first_row_(first_row), threshold_(threshold) {}
  Tensor dropped(const Tensor& seed) const {
    return threshold_ > 0 ? drop(rows_, seed, threshold_, first_row_) : rows_;
  }

 private:
  Tensor rows_;
  int64_t first_row_ = 0, threshold_ = 0;
};

// Whether rows meet each factor in narrow products, and all of them in one, which takes that nothing is dropped out.
struct Narrow {
  bool each, together;

  Narrow(const Tensor& rows, const variable_list& factors, const SharedShrinkCall& c) {
    int64_t most = 0, all = 0;
    for (const Tensor& A : factors) most = std::max(most, A.size(0)), all += A.size(0);
    const auto type = factors[0].scalar_type();
    each = narrow::serves(rows, 0, type, most);
    together = each && c.threshold == 0 && narrow::serves(rows, 0, type, all);
  }
};

// Tensors beside each other in t along a dimension, as wide there as these factors' ranks, in memory of their own.
variable_list parted(const Tensor& t, int64_t dim, const variable_list& factors) {
  variable_list parts;
  int64_t at = 0;
  for (const Tensor& A : factors) {
    parts.push_back(t.narrow(dim, at, A.size(0)).clone(at::MemoryFormat::Contiguous));
    at += A.size(0);
  }
  return parts;
}

// Where the products are several, a block of x is in the caches for all of them.
variable_list shrink_all(const Tensor& x2, const variable_list& factors, const Tensor& seeds, const SharedShrinkCall& c) {
  const auto type = factors[0].scalar_type();
  const Narrow narrow(x2, factors, c);
  if (narrow.together) return parted(narrow::times(x2, at::cat(factors).t(), 1), 1, factors);
  const Blocks blocks(x2, x2.size(1), true);
  variable_list found(factors.size());
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block(blocks.of(x2, i), i * blocks.step, type, narrow.each, c.threshold);
    for (size_t j = 0; j < factors.size(); ++j) {
      const Tensor rows = block.dropped(seed_of_factor(seeds, j)), A = factors[j].t();
      const Tensor S = narrow.each ? narrow::times(rows, A, 1) : product(rows, A, 1);
      if (blocks.whole()) {
        found[j] = S;
        continue;
      }
      if (!found[j].defined()) found[j] = at::empty({x2.size(0), S.size(1)}, S.options());
      blocks.of(found[j], i).copy_(S);
    }
  }
  return found;
}

// Whether a gradient is no one else's, as autograd asks before it adds to one in place.
bool own(const Tensor& t) {
  return plain(t) && t.is_contiguous() && t.use_count() == 1 && t.storage().use_count() == 1;
}

int64_t defined_rows(const variable_list& grads) {
  for (const Tensor& dS : grads)
    if (dS.defined()) return dS.size(0);
  return 0;
}

// dA of the factors that need one, and dx = onto + theirs unless dx is undefined: of each one product for all factors.
std::vector<Tensor> narrow_backward(const variable_list& grads, const Tensor& dx, const Tensor& onto, const Tensor& x2,
                                    const variable_list& factors, const std::vector<bool>& needs) {
  std::vector<Tensor> found(grads.size());
  variable_list parts, of_parts;
  std::vector<size_t> places;
  for (size_t j = 0; j < grads.size(); ++j)
    if (grads[j].defined()) parts.push_back(grads[j]), of_parts.push_back(factors[j]), places.push_back(j);
  const Tensor dS = at::cat(parts, 1);
  if (std::find(needs.begin(), needs.end(), true) != needs.end()) {
    const auto of_factors = parted(narrow::over_rows(dS, x2, 1), 0, of_parts);
    for (size_t i = 0; i < places.size(); ++i)
      if (needs[places[i]]) found[places[i]] = of_factors[i];
  }
  if (dx.defined()) narrow::add_product(dx, onto, Tensor(), dS, at::cat(of_parts), 1);
  return found;
}

// dx [M, K], in the memory of `onto` where that is defined, and dA of the factors that need one.
SharedShrinkGrads shrink_all_backward(const variable_list& grads, const Tensor& onto, const Tensor& x2,
                                      const variable_list& factors, const Tensor& seeds, bool need_x,
                                      const std::vector<bool>& needs, const SharedShrinkCall& c) {
  const auto type = factors[0].scalar_type();
  const int64_t m = defined_rows(grads), k = factors[0].size(1);
  SharedShrinkGrads found{Tensor(), std::vector<Tensor>(grads.size())};
  Tensor dx;
  if (need_x) dx = onto.defined() ? onto : at::empty({m, k}, factors[0].options().dtype(c.x_type));
  const Narrow narrow(need_x ? dx : x2, factors, c);
  if (narrow.together) return {dx, narrow_backward(grads, dx, onto, x2, factors, needs)};
  // In blocks x is in the caches for all factors; sums of them in half precision would be less exact.
  const Blocks blocks(need_x ? dx : x2, k, c.threshold > 0 || type == at::kFloat || type == at::kDouble);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = x2.defined() ? Block(blocks.of(x2, i), i * blocks.step, type, narrow.each, c.threshold) : Block();
    const Tensor out = blocks.of(dx, i);
    Tensor back;
    for (size_t j = 0; j < grads.size(); ++j) {
      if (!grads[j].defined()) continue;
      const Tensor dS = blocks.of(grads[j], i), seed = seed_of_factor(seeds, j);
      if (needs[j]) {
        const Tensor rows = block.dropped(seed);
        accumulate(found.factors[j], narrow.each ? narrow::over_rows(dS, rows, 1) : product(dS.t(), rows, 1));
      }
      if (!need_x) continue;
      const Tensor one = product(dS, factors[j], 1);
      if (c.threshold > 0) drop_(one, seed, c.threshold, i * blocks.step);
      accumulate(back, one);
    }
    if (back.defined()) onto.defined() ? out.add_(back) : out.copy_(back);
  }
  found.x = dx;
  return found;
}

variable_list saved_by(AutogradContext* ctx, at::ArrayRef<const char*> names) {
  try {
    return saved_of(ctx, names);
  } catch (const c10::Error& error) {
    const std::string what = error.what_without_backtrace();
    if (what.find("a second time") == std::string::npos) throw;
    TORCH_CHECK(false, "peft_fused: layers that share their input are differentiated in one backward: pass "
                       "retain_graph=True to the others before it, or accelerate(model, group=False). autograd says: ", what);
  }
}

// -------------------------------------------------------------------------------------------------------------- node

struct SharedShrink : torch::autograd::Function<SharedShrink> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList factors,
                               const std::optional<Tensor>& drawn, const c10::intrusive_ptr<SharedShrinkCall>& call) {
    const BelowAutograd guard;
    const Tensor seeds = drawn.value_or(Tensor());
    ctx->set_materialize_grads(false);
    const SharedShrinkCall& c = *call;
    const variable_list all(factors.begin(), factors.end());
    const Tensor x2 = rows_of(x);
    variable_list found = c.on_triton ? shared_shrink_triton_fwd(triton_call(x2, all, seeds, c), c.on_triton->plan)
                                      : shrink_all(x2, all, seeds, c);
    if (c.grad) {
      const bool needs_x = x.requires_grad();
      bool needs_factor = false;
      for (const Tensor& A : all) needs_factor = needs_factor || A.requires_grad();
      variable_list saved{kept(needs_factor, x, "x"), kept(needs_x || needs_factor, seeds, "seed")};
      for (const Tensor& A : all) saved.push_back(kept(needs_x || needs_factor, A, "A"));
      ctx->save_for_backward(saved);
      ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    }
    if (c.passes_x) found.insert(found.begin(), x);  // of which autograd makes a view
    return found;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto call = call_of<SharedShrinkCall>(ctx);
    call->ran = true;
    const SharedShrinkCall& c = *call;
    const auto of_S = at::ArrayRef<Tensor>(grads).slice(c.passes_x ? 1 : 0);
    const size_t count = of_S.size();
    variable_list out(count + 3);
    const bool need_x = ctx->needs_input_grad(0), passed = need_x && c.passes_x && grads[0].defined();
    std::vector<bool> needs;
    bool any = false, need_factors = false;
    for (size_t i = 0; i < count; ++i) {
      needs.push_back(of_S[i].defined() && ctx->needs_input_grad(1 + i));
      any = any || (of_S[i].defined() && (need_x || needs[i]));
      need_factors = need_factors || needs[i];
    }
    if (!any) {
      if (passed) out[0] = grads[0];
      return out;
    }
    variable_list defined;
    for (const Tensor& dS : of_S) defined.push_back(dS.defined() ? upstream(dS, "shared_shrink") : dS);
    std::vector<const char*> names{"x", "seed"};
    names.resize(2 + count, "A");
    const auto saved = saved_by(ctx, names);
    const BelowAutograd guard;
    const variable_list factors(saved.begin() + 2, saved.end());
    const Tensor x2 = need_factors ? rows_of(saved[0]) : Tensor();
    Tensor onto;  // to be written to
    if (passed && own(grads[0])) {
      onto = rows_of(grads[0]);
    } else if (passed) {
      onto = rows_of(readable(grads[0], "the gradient of x")).clone(at::MemoryFormat::Contiguous);
    }
    if (defined_rows(defined) == 0) {  // nothing to sum over
      for (size_t i = 0; i < count; ++i)
        if (needs[i]) out[1 + i] = at::zeros(factors[i].sizes(), factors[i].options());
      if (need_x) out[0] = onto.defined() ? onto.view(c.sizes) : at::empty(c.sizes, factors[0].options().dtype(c.x_type));
      return out;
    }
    const SharedShrinkGrads found =
        c.on_triton ? shared_shrink_triton_bwd(defined, onto, triton_call(x2, factors, saved[1], c), need_x, needs,
                                               c.on_triton->plan)
                    : shrink_all_backward(defined, onto, x2, factors, saved[1], need_x, needs, c);
    if (need_x) out[0] = found.x.to(c.x_type).view(c.sizes);
    for (size_t i = 0; i < count; ++i) out[1 + i] = found.factors[i];
    return out;
  }
};

}  // namespace

bool shared_shrink_ran(const Tensor& S) {
  using Node = torch::autograd::CppNode<SharedShrink>;
  auto* const node = dynamic_cast<Node*>(S.grad_fn().get());
  return node && c10::static_intrusive_pointer_cast<SharedShrinkCall>(node->ctx_.saved_data["call"].toCapsule())->ran;
}

void autocast(SharedShrinkArguments& a) {
  std::vector<Tensor*> parameters;
  for (Tensor& A : a.factors) parameters.push_back(&A);
  autocast(a.x, {&a.x}, parameters);
}

Key key_of(SharedShrinkArguments& a) {
  Key key(a.x);
  key.add(a.x);
  for (const Tensor& A : a.factors) key.add(A, /*parameter=*/true);
  key.add(a.dropout);
  key.add(static_cast<double>(a.out_features));
  return key;
}

std::vector<Tensor> shared_shrink(const SharedShrinkArguments& a, c10::intrusive_ptr<LowRankOnTriton> on_triton) {
  auto call = c10::make_intrusive<SharedShrinkCall>();
  call->on_triton = std::move(on_triton);
  call->threshold = a.dropout.threshold();
  call->grad = at::GradMode::is_enabled();
  call->passes_x = call->grad && a.x.requires_grad();
  call->x_type = a.x.scalar_type();
  call->sizes = a.x.sizes().vec();
  Tensor seeds;
  if (call->threshold > 0) seeds = draw_seeds({static_cast<int64_t>(a.factors.size())}, a.x.device());
  variable_list found = SharedShrink::apply(a.x, at::TensorList(a.factors), optional(seeds), call);
  if (!call->passes_x) found.insert(found.begin(), a.x);
  return found;
}

}  // namespace peft_fused
