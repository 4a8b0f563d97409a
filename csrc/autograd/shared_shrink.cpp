// The low-rank products of several layers with the x that they share, as one autograd node: ops/shared_shrink.py in C++.
#include "shared_shrink.h"

#include <atomic>
#include <limits>

#include "../dropout.h"
#include "../memory.h"

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SharedShrinkCall : torch::CustomClassHolder {
  int64_t threshold = 0;
  bool mixed = false, grad = false;
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

// Factors side by side where all are multiplied with the same rows, and each for itself where each has its own mask.
struct Products {
  std::vector<Tensor> factors;      // [ranks, K]
  std::vector<Tensor> seeds;        // 0-d, or undefined
  std::vector<int64_t> first, ranks;  // of each factor among the columns of all S
  int64_t width = 0;

  Products(const variable_list& given, const Tensor& all_seeds) {
    for (size_t i = 0; i < given.size(); ++i) {
      first.push_back(width), ranks.push_back(given[i].size(0));
      width += ranks.back();
      if (all_seeds.defined()) factors.push_back(given[i]), seeds.push_back(all_seeds.select(0, static_cast<int64_t>(i)));
    }
    if (!all_seeds.defined()) factors = {at::cat(given)}, seeds = {Tensor()};
  }
  // Columns of all S that belong to product j.
  Tensor columns(const Tensor& S, size_t j) const {
    return factors.size() == 1 ? S : S.narrow(1, first[j], ranks[j]);
  }
};

variable_list shrink_all(const Tensor& x2, const variable_list& factors, const Tensor& seeds, const SharedShrinkCall& c) {
  const Products products(factors, seeds);
  const auto type = factors[0].scalar_type();
  const Tensor S = at::empty({x2.size(0), products.width}, factors[0].options());
  const Blocks blocks(x2, x2.size(1), c.mixed || c.threshold > 0);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Tensor block = blocks.of(x2, i).to(type), out = blocks.of(S, i);
    for (size_t j = 0; j < products.factors.size(); ++j) {
      const Tensor rows = c.threshold > 0 ? drop(block, products.seeds[j], c.threshold, i * blocks.step) : block;
      products.columns(out, j).copy_(product(rows, products.factors[j].t(), 1));
    }
  }
  variable_list found;
  for (size_t i = 0; i < factors.size(); ++i) found.push_back(S.narrow(1, products.first[i], products.ranks[i]));
  return found;
}

// Whether a gradient is no one else's, as autograd asks before it adds to one in place.
bool own(const Tensor& t) {
  return plain(t) && t.is_contiguous() && t.use_count() == 1 && t.storage().use_count() == 1;
}

// Gradients of S that have one, in order.
struct Given {
  variable_list of_S, factors;
  std::vector<size_t> places;
  Tensor seeds;

  Given(at::ArrayRef<Tensor> grads, const variable_list& all, const Tensor& all_seeds) : seeds(all_seeds) {
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) of_S.push_back(grads[i]), factors.push_back(all[i]), places.push_back(i);
    if (!seeds.defined() || places.size() == grads.size()) return;
    variable_list kept;
    for (const size_t i : places) kept.push_back(seeds.select(0, static_cast<int64_t>(i)));
    seeds = at::stack(kept);
  }
};

// dx [M, K], in the memory of `onto` where that is defined, and dA of the factors that need one.
SharedShrinkGrads shrink_all_backward(const variable_list& grads, const Tensor& onto, const Tensor& x2,
                                      const variable_list& factors, const Tensor& seeds, int64_t k, bool need_x,
                                      const std::vector<bool>& needs, const SharedShrinkCall& c) {
  const Given given(grads, factors, seeds);
  const Products products(given.factors, given.seeds);
  const Tensor dS = given.of_S.size() == 1 ? given.of_S[0] : at::cat(given.of_S, 1);
  const auto type = dS.scalar_type();
  const bool blocked = c.mixed || c.threshold > 0, need_factors = x2.defined();
  const Blocks blocks(dS, k, blocked);
  std::vector<Tensor> dA(products.factors.size());
  Tensor dx;
  if (need_x) dx = onto.defined() ? onto : at::empty({dS.size(0), k}, dS.options().dtype(c.x_type));
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Tensor block = need_factors ? blocks.of(x2, i).to(type) : Tensor(), parts = blocks.of(dS, i);
    Tensor back;
    for (size_t j = 0; j < products.factors.size(); ++j) {
      const Tensor part = products.columns(parts, j);
      if (need_factors) {
        const Tensor rows = c.threshold > 0 ? drop(block, products.seeds[j], c.threshold, i * blocks.step) : block;
        accumulate(dA[j], product(part.t(), rows, 1));
      }
      if (!need_x) continue;
      if (!blocked && onto.defined()) {
        dx.addmm_(part, products.factors[j]);
        continue;
      }
      const Tensor one = product(part, products.factors[j], 1);
      if (c.threshold > 0) drop_(one, products.seeds[j], c.threshold, i * blocks.step);
      accumulate(back, one);
    }
    if (!back.defined()) continue;
    Tensor out = blocks.of(dx, i);
    onto.defined() ? out.add_(back) : out.copy_(back);
  }
  SharedShrinkGrads found{dx, std::vector<Tensor>(grads.size())};
  for (size_t i = 0; i < given.places.size(); ++i) {
    if (!needs[given.places[i]]) continue;
    // A tensor of its own, because a gradient may outlive the others.
    found.factors[given.places[i]] =
        dA.size() == 1 ? dA[0].narrow(0, products.first[i], products.ranks[i]).clone() : dA[i].contiguous();
  }
  return found;
}

int64_t defined_rows(const variable_list& grads) {
  for (const Tensor& dS : grads)
    if (dS.defined()) return dS.size(0);
  return 0;
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
    const auto saved = saved_of(ctx, names);
    const BelowAutograd guard;
    const variable_list factors(saved.begin() + 2, saved.end());
    const Tensor x2 = need_factors ? rows_of(saved[0]) : Tensor();
    Tensor onto;  // to be written to
    if (passed) onto = own(grads[0]) ? rows_of(grads[0]) : rows_of(readable(grads[0], "the gradient of x")).clone();
    if (onto.defined() && !onto.is_contiguous()) onto = onto.contiguous();
    const int64_t k = factors[0].size(1);
    if (defined_rows(defined) == 0) {  // nothing to sum over
      for (size_t i = 0; i < count; ++i)
        if (needs[i]) out[1 + i] = at::zeros(factors[i].sizes(), factors[i].options());
      if (need_x) out[0] = onto.defined() ? onto.view(c.sizes) : at::empty(c.sizes, factors[0].options().dtype(c.x_type));
      return out;
    }
    const SharedShrinkGrads found =
        c.on_triton ? shared_shrink_triton_bwd(defined, onto, triton_call(x2, factors, saved[1], c), need_x, needs,
                                               c.on_triton->plan)
                    : shrink_all_backward(defined, onto, x2, factors, saved[1], k, need_x, needs, c);
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
  call->mixed = a.factors[0].scalar_type() != a.x.scalar_type();
  call->grad = at::GradMode::is_enabled();
  call->passes_x = call->grad && a.x.requires_grad();
  call->x_type = a.x.scalar_type();
  call->sizes = a.x.sizes().vec();
  Tensor seeds;  // drawn one after the other, as the layers would
  if (call->threshold > 0) {
    const auto options = at::TensorOptions().dtype(at::kLong).device(a.x.device());
    seeds = at::randint(0, std::numeric_limits<int64_t>::max(), {static_cast<int64_t>(a.factors.size())}, options);
  }
  variable_list found = SharedShrink::apply(a.x, at::TensorList(a.factors), optional(seeds), call);
  if (!call->passes_x) found.insert(found.begin(), a.x);
  return found;
}

}  // namespace peft_fused
