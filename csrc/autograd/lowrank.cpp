// The low-rank op as one autograd node. The composition is the one ops/lowrank_torch.py explains; here it is made of
// ATen calls without Python between them, of csrc/narrow.h for fp32 adapters of few ranks on a CPU, and on CUDA the
// product with A is csrc/kernels/lowrank.cu.
#include "lowrank.h"

#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "../dropout.h"
#include "../memory.h"
#include "../narrow.h"

#ifdef PEFT_FUSED_CUDA
#include "../kernels/launch.h"
#endif

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ------------------------------------------------------------------------------------------------------------ pieces

enum LowRankInput { kX, kWeight, kAdd, kBias, kA, kB, kU, kV, kS, kLowRankInputs };

// Everything backward needs that is no tensor to be differentiated.
struct LowRankCall : torch::CustomClassHolder {
  double scale = 1;
  int64_t rank = 0, expert_a = 0, expert_b = 0, threshold = 0;
  bool frozen = false, mixed = false;
  bool grad = false;  // whether autograd records the call
  int64_t given_columns = 0;  // of S, where it is an input
  c10::intrusive_ptr<LowRankOnTriton> on_triton;
  // Position of each input among the tensors that are present, as the node numbers its edges; -1 for an absent one.
  int edge[kLowRankInputs];
};

struct Device {  // controls that stay on the device
  Tensor scale, rank, expert_a, expert_b, seed;
};

Tensor choose(const Tensor& stack, int64_t index, const Tensor& device_index) {
  if (!stack.defined() || stack.dim() == 2) return stack;
  if (device_index.defined()) return stack.index_select(0, device_index.reshape({1}).to(at::kLong)).squeeze(0);
  return stack.select(0, index);
}

// The live part of the adapter: experts chosen, truncated to the rank where that is known here. Backward may come
// without A, or without all of it, where no gradient reads them.
struct Adapter {
  Tensor A, B, u, v, kept;
  int64_t width = 0;

  Adapter(const Tensor& a, const Tensor& b, const Tensor& u_, const Tensor& v_, const LowRankCall& c, const Device& d)
      : A(choose(a, c.expert_a, d.expert_a)), B(choose(b, c.expert_b, d.expert_b)), u(u_), v(v_) {
    if (!B.defined()) return;
    width = B.size(1);
    if (d.rank.defined()) {
      kept = at::arange(width, B.options().dtype(at::kLong)).lt(d.rank).to(B.scalar_type());
    } else if (c.rank < width) {
      width = c.rank;
      if (A.defined()) A = A.narrow(0, 0, width);
      B = B.narrow(1, 0, width);
      if (u.defined()) u = u.narrow(0, 0, width);
    }
  }
  Tensor mask(const Tensor& S) const { return kept.defined() ? S * kept : S; }
  // Without the columns beyond the ranks, which S may have where it is given or comes from Triton's kernels.
  Tensor live(const Tensor& S) const { return S.defined() && S.size(1) > width ? S.narrow(1, 0, width) : S; }
  // v . B
  Tensor weighted() const { return v.defined() ? B * v.unsqueeze(1) : B; }
  // v . B . u, by a scale of the device: the operand beside S forward and beside dY backward.
  Tensor outer(const Device& d) const {
    const Tensor Q = u.defined() ? weighted() * u : weighted();
    return d.scale.defined() ? Q * d.scale : Q;
  }
};

#ifdef PEFT_FUSED_CUDA
// S = keep_rank(A drop(x)) [m, width] by the CUDA kernel.
Tensor shrink_cuda(const Tensor& x2, const Tensor& A_stack, const Adapter& ad, const LowRankCall& c, const Device& d) {
  const Tensor x = x2.stride(1) == 1 ? x2 : x2.contiguous();
  const Tensor A = A_stack.stride(-1) == 1 ? A_stack : A_stack.contiguous();
  Tensor S = at::empty({x.size(0), ad.width}, A.options());
  const c10::DeviceGuard guard(x.device());
  const Tensor rank = d.rank.defined() ? d.rank.to(at::kLong) : Tensor();
  const Tensor expert = d.expert_a.defined() ? d.expert_a.to(at::kLong) : Tensor();
  ShrinkParams p{};
  p.x = x.const_data_ptr();
  p.A = A.const_data_ptr();
  p.S = S.mutable_data_ptr();
  p.seed = c.threshold > 0 ? d.seed.const_data_ptr<int64_t>() : nullptr;
  p.m = x.size(0);
  p.k = x.size(1);
  p.x_row = x.stride(0);
  p.a_expert = A.dim() == 3 ? A.stride(0) : 0;
  p.a_row = A.stride(-2);
  p.r = static_cast<int>(ad.width);
  p.threshold = static_cast<uint32_t>(c.threshold);
  p.keep_scale = keep_scale(c.threshold);
  p.rank = {rank.defined() ? rank.const_data_ptr<int64_t>() : nullptr, ad.width};
  p.expert = {expert.defined() ? expert.const_data_ptr<int64_t>() : nullptr, c.expert_a};
  p.x_type = type_of(x);
  p.a_type = type_of(A);
  check_launch(shrink(p, current_stream(x.device())), "shrink");
  return S;
}
#endif

// The type in which x meets an adapter: narrow products convert it as they read, but not before it is dropped out.
at::ScalarType type_beside(const Tensor& x, at::ScalarType adapter, const LowRankCall& c, bool narrow) {
  return narrow && c.threshold == 0 ? x.scalar_type() : adapter;
}

// y [m, n] = (x W^T | add) + bias + scale * v . B (u . S), and S, computed unless it is given.
std::pair<Tensor, Tensor> adapt(const Tensor& x2, const Tensor& weight, const Tensor& add2, const Tensor& bias,
                                const Tensor& A_stack, const Tensor& given, const Adapter& ad, const LowRankCall& c,
                                const Device& d) {
  const int64_t m = x2.size(0), n = ad.B.size(0);
  const Tensor W = weight.defined() ? weight.t() : weight;
  const bool base_first = W.defined() && uses_onednn(x2, W);
  const Tensor y = base_first ? onednn_linear(x2, weight, bias) : at::empty({m, n}, x2.options());
  const Tensor Q = ad.outer(d).t();
  Tensor S = ad.live(given);
  bool have_S = S.defined();
#ifdef PEFT_FUSED_CUDA
  if (x2.is_cuda() && !have_S) {
    S = shrink_cuda(x2, A_stack, ad, c, d);
    have_S = true;
  }
#endif
  const bool narrow = narrow::serves(x2, n, ad.B.scalar_type(), ad.width);
  const Blocks blocks(x2, std::max(x2.size(1), n), (c.mixed && !narrow) || c.threshold > 0);
  if (!blocks.whole() && !have_S) S = at::empty({m, ad.width}, ad.A.options());
  for (int64_t i = 0; i < blocks.count; ++i) {
    Tensor P;
    if (have_S) {
      P = blocks.of(S, i);
    } else {
      const auto type = type_beside(x2, ad.A.scalar_type(), c, narrow);
      const Tensor in = blocks.cast_and_drop(x2, i, type, c.threshold, d.seed);
      P = ad.mask(narrow ? narrow::times(in, ad.A.t(), 1) : product(in, ad.A.t(), 1));
      if (blocks.whole()) {
        S = P;
      } else {
        blocks.of(S, i).copy_(P);
      }
    }
    Tensor rows = blocks.of(y, i);
    const Tensor onto = base_first ? rows : blocks.of(add2, i);
    if (narrow) {
      narrow::add_product(rows, onto, base_first ? Tensor() : bias, P, Q, c.scale);
    } else if (c.mixed) {
      Tensor delta = bias.defined() ? at::addmm(bias.to(P.scalar_type()), P, Q, 1, c.scale) : product(P, Q, c.scale);
      if (onto.defined()) delta.add_(onto);
      rows.copy_(delta);
    } else if (base_first) {
      rows.addmm_(P, Q, 1, c.scale);
    } else if (onto.defined() || bias.defined()) {
      at::addmm_out(rows, onto.defined() ? onto : bias, P, Q, 1, c.scale);
    } else {
      rows.addmm_(P, Q, /*beta=*/0, c.scale);
    }
  }
  if (W.defined() && !base_first) y.addmm_(x2, W);
  return {y, given.defined() ? given : S};
}

// The gradient of the live rows (columns) of a factor, in a tensor like the factor, zero elsewhere.
Tensor place(Tensor grad, const Tensor& factor, int64_t expert, const Tensor& device_expert, const LowRankCall& c,
             const Device& d, bool columns) {
  if (c.frozen) {
    const int64_t width = grad.size(columns ? 1 : 0);
    const Tensor ranks = at::arange(width, grad.options().dtype(at::kLong));
    const Tensor others = d.rank.defined() ? ranks.ne(d.rank - 1) : ranks.ne(c.rank - 1);
    grad = grad.masked_fill(columns ? others : others.unsqueeze(1), 0);  // a product would leave NaNs in them
  }
  if (factor.dim() == 2 && grad.sizes() == factor.sizes()) return grad.contiguous();
  Tensor full = at::zeros(factor.sizes(), factor.options());
  if (factor.dim() == 3 && device_expert.defined())
    return full.index_copy_(0, device_expert.reshape({1}).to(at::kLong), grad.unsqueeze(0));
  Tensor slot = factor.dim() == 3 ? full.select(0, expert) : full;
  slot.narrow(columns ? 1 : 0, 0, grad.size(columns ? 1 : 0)).copy_(grad);
  return full;
}

LowRankTritonCall triton_call(const Tensor& x2, const Tensor& weight, const Tensor& add2, const Tensor& bias,
                              const Tensor& A, const Tensor& B, const Tensor& u, const Tensor& v, const Tensor& S,
                              const LowRankCall& c, const Device& d) {
  const auto control = [](const Tensor& t, double number) { return Control{t, number}; };
  LowRankTritonCall call{x2, weight, add2, bias, A, B, u, v, d.seed};
  call.scale = control(d.scale, c.scale);
  call.rank = control(d.rank, static_cast<double>(c.rank));
  call.expert_a = control(d.expert_a, static_cast<double>(c.expert_a));
  call.expert_b = control(d.expert_b, static_cast<double>(c.expert_b));
  call.threshold = c.threshold, call.frozen = c.frozen, call.precision = c.on_triton->precision;
  call.S = S;
  return call;
}

// -------------------------------------------------------------------------------------------------------------- node

struct LowRank : torch::autograd::Function<LowRank> {
  using Optional = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& weight_, const Optional& add_,
                        const Optional& bias_, const Optional& A_, const Tensor& B, const Optional& u_,
                        const Optional& v_, const Optional& S_, const c10::intrusive_ptr<LowRankCall>& call,
                        const Device& d) {
    const BelowAutograd guard;
    const LowRankCall& c = *call;
    const auto get = [](const Optional& t) { return t ? *t : Tensor(); };
    const Tensor weight = get(weight_), add = get(add_), bias = get(bias_), u = get(u_), v = get(v_);
    const Tensor A = get(A_), given = get(S_);
    const Tensor x2 = rows_of(x), add2 = add.defined() ? rows_of(add) : add;
    const auto [y, S] =
        c.on_triton ? lowrank_triton_fwd(triton_call(x2, weight, add2, bias, A, B, u, v, given, c, d), c.on_triton->plan)
                    : adapt(x2, weight, add2, bias, A, given, Adapter(A, B, u, v, c, d), c, d);
    if (!c.grad) return unflatten(y, x);
    const auto needs = [&](const Tensor& t) { return t.defined() && t.requires_grad(); };
    const bool keeps_x = needs(A) || needs(weight), keeps_A = A.defined() && (needs(A) || needs(x));
    const bool keeps_S = needs(B) || needs(u) || needs(v), keeps_adapter = keeps_A || keeps_S || needs(given);
    const bool any = keeps_x || needs(x) || keeps_adapter;
    ctx->save_for_backward({kept(keeps_x, x, "x"), kept(needs(x), weight, "weight"), kept(keeps_A, A, "A"),
                            kept(keeps_adapter, B, "B"), kept(keeps_adapter, u, "u"), kept(keeps_adapter, v, "v"),
                            kept(keeps_S, S, "S"), kept(any, d.scale, "scale"), kept(any, d.rank, "rank"),
                            kept(any, d.expert_a, "expert"), kept(any, d.expert_b, "expert"),
                            kept(any, d.seed, "seed")});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return unflatten(y, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(kLowRankInputs + 2);
    if (!grads[0].defined()) return out;
    const Tensor dy = upstream(grads[0], "lowrank");
    const auto call = call_of<LowRankCall>(ctx);
    const LowRankCall& c = *call;
    const auto saved = saved_of(ctx, {"x", "weight", "A", "B", "u", "v", "S", "scale", "rank", "expert", "expert",
                                      "seed"});
    const BelowAutograd guard;
    const Tensor &x = saved[0], &weight = saved[1], &A = saved[2], &B = saved[3], &u = saved[4], &v = saved[5];
    const Device d{saved[7], saved[8], saved[9], saved[10], saved[11]};
    const auto need = [&](LowRankInput i) { return c.edge[i] >= 0 && ctx->needs_input_grad(c.edge[i]); };

    const Tensor dy2 = rows_of(dy);
    const int64_t m = dy2.size(0), n = dy2.size(1);
    const int64_t k = A.defined() ? A.size(-1) : weight.defined() ? weight.size(1) : 0;
    const bool need_x = need(kX) && (A.defined() || weight.defined());
    auto of_x = dy.sizes().vec();
    of_x.back() = k;
    if (c.on_triton && B.defined()) {
      const Tensor x2 = x.defined() ? rows_of(x) : x;
      LowRankNeeds needs{need_x, need(kWeight), need(kBias), need(kA), need(kB), need(kU), need(kV)};
      needs.S = need(kS);
      const auto call = triton_call(x2, weight, Tensor(), Tensor(), A, B, u, v, Tensor(), c, d);
      const auto found = lowrank_triton_bwd(dy2, call, saved[6], needs, c.on_triton->plan);
      out[kWeight] = found.weight, out[kBias] = found.bias, out[kA] = found.A, out[kB] = found.B;
      out[kU] = found.u, out[kV] = found.v;
      if (need(kS)) out[kS] = found.S.narrow(1, 0, c.given_columns);
      if (need_x) out[kX] = found.x.view(of_x);
      if (need(kAdd)) out[kAdd] = dy;
      return out;
    }
    const Adapter ad(A, B, u, v, c, d);
    const int64_t width = ad.width;
    if (need(kBias)) out[kBias] = dy2.sum(0);
    if (need(kAdd)) out[kAdd] = dy;
    if (m == 0) {  // zeros times a factor that is not finite would be NaN
      const auto zeros = [&](LowRankInput i, const Tensor& t) { if (need(i)) out[i] = at::zeros(t.sizes(), t.options()); };
      zeros(kA, A);
      zeros(kB, B);
      zeros(kU, u);
      zeros(kV, v);
      if (need(kWeight)) out[kWeight] = at::zeros({n, x.size(-1)}, x.options());
      if (need_x) out[kX] = at::empty(of_x, dy.options());
      if (need(kS)) out[kS] = at::zeros({0, c.given_columns}, B.options());
      return out;
    }
    const bool adapter_dx = need_x && A.defined(), need_raw = need(kB) || need(kU) || need(kV);
    const bool need_dS = adapter_dx || need(kA) || need(kS);
    const Tensor S = ad.live(saved[6]);

    // Per block of rows, from one visit of dY and one of x: dS, and the block's share of dY^T S, dA and dx.
    const auto type = B.defined() ? B.scalar_type() : dy2.scalar_type();
    const bool narrow = narrow::serves(dy2, k, type, width);
    const bool blocked = (c.mixed && !narrow) || c.threshold > 0;
    const Blocks blocks(dy2, std::max(n, k), blocked);
    const Tensor x2 = x.defined() ? rows_of(x) : x;
    const Tensor outer = need_dS ? ad.mask(ad.outer(d)) : Tensor();
    const bool base_first = need_x && weight.defined() && uses_onednn(dy2, weight);
    Tensor dx;
    if (need_x) dx = base_first ? onednn_linear(dy2, weight.t(), Tensor()) : at::empty({m, k}, dy2.options());
    if (need(kS)) {
      out[kS] = c.given_columns > width ? at::zeros({m, c.given_columns}, B.options())
                                        : at::empty({m, width}, B.options());
    }
    Tensor raw, dA;
    const bool raw_transposed = !narrow && m * n > kSmallProduct;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Tensor part = blocks.of(dy2, i), dyi = c.mixed && !narrow ? part.to(type) : part, Si = blocks.of(S, i);
      if (need_raw) {
        accumulate(raw, narrow           ? narrow::over_rows(Si, dyi, c.scale, /*transposed=*/true)
                        : raw_transposed ? product(Si.t(), dyi, c.scale)
                                         : product(dyi.t(), Si, c.scale));
      }
      if (!need_dS) continue;
      const Tensor dS = narrow ? narrow::times(dyi, outer, c.scale) : product(dyi, outer, c.scale);
      if (need(kS)) blocks.of(ad.live(out[kS]), i).copy_(dS);
      if (need(kA)) {
        const Tensor in = blocks.cast_and_drop(x2, i, type_beside(x2, type, c, narrow), c.threshold, d.seed);
        accumulate(dA, narrow ? narrow::over_rows(dS, in, 1) : product(dS.t(), in, 1));
      }
      if (adapter_dx) {
        Tensor out_rows = blocks.of(dx, i);
        if (narrow && c.threshold == 0) {
          narrow::add_product(out_rows, base_first ? out_rows : Tensor(), Tensor(), dS, ad.A, 1);
        } else if (!base_first && !c.mixed) {
          at::mm_out(out_rows, dS, ad.A);
          if (c.threshold > 0) drop_(out_rows, d.seed, c.threshold, i * blocks.step);
        } else if (!blocked) {
          out_rows.addmm_(dS, ad.A);
        } else {
          const Tensor back = product(dS, ad.A, 1);
          if (c.threshold > 0) drop_(back, d.seed, c.threshold, i * blocks.step);
          base_first ? out_rows.add_(back) : out_rows.copy_(back);
        }
      }
    }
    if (need_raw) {
      if (raw_transposed) raw = raw.t();
      if (d.scale.defined()) raw = raw * d.scale;
      if (need(kU)) {
        out[kU] = at::zeros_like(u);
        out[kU].narrow(0, 0, width).copy_((ad.weighted() * raw).sum(0));
      }
      if (ad.u.defined()) raw = raw * ad.u;
      if (need(kV)) out[kV] = (ad.B * raw).sum(1);
      if (need(kB))
        out[kB] = place(v.defined() ? raw * v.unsqueeze(1) : raw, B, c.expert_b, d.expert_b, c, d, /*columns=*/true);
    }
    if (need(kA)) out[kA] = place(dA, A, c.expert_a, d.expert_a, c, d, /*columns=*/false);
    if (need(kWeight)) out[kWeight] = dy2.t().mm(x2);
    if (need_x) {
      if (weight.defined() && !base_first) dx.addmm_(dy2, weight, /*beta=*/adapter_dx ? 1 : 0);
      out[kX] = dx.view(of_x);
    }
    return out;
  }
};

}  // namespace

void autocast(LowRankArguments& a) {
  autocast(a.x, {&a.x, &a.weight, &a.add, &a.bias}, {&a.A, &a.B, &a.u, &a.v, &a.S});
}

Key key_of(LowRankArguments& a) {
  Key key(a.x);
  for (const Tensor* t : {&a.x, &a.weight, &a.add, &a.bias}) key.add(*t);
  for (const Tensor* t : {&a.A, &a.B, &a.u, &a.v, &a.S}) key.add(*t, /*parameter=*/true);
  key.add(a.scale);
  key.add(a.rank, a.has_rank);
  key.add(a.expert_a, a.has_expert_a);
  key.add(a.expert_b, a.has_expert_b);
  key.add(a.dropout);
  key.add(static_cast<double>(a.frozen));
  return key;
}

Tensor lowrank(const LowRankArguments& a, c10::intrusive_ptr<LowRankOnTriton> on_triton) {
  auto call = c10::make_intrusive<LowRankCall>();
  call->on_triton = std::move(on_triton);
  call->rank = a.has_rank ? static_cast<int64_t>(a.rank.number) : a.B.size(-1);
  call->expert_a = static_cast<int64_t>(a.expert_a.number);
  call->expert_b = static_cast<int64_t>(a.expert_b.number);
  call->threshold = a.dropout.threshold();
  call->frozen = a.frozen;
  call->grad = at::GradMode::is_enabled();
  call->mixed = a.B.scalar_type() != a.x.scalar_type();
  if (a.S.defined()) call->given_columns = a.S.size(1);
  Device d{a.scale.tensor, a.rank.tensor, a.expert_a.tensor, a.expert_b.tensor,
           a.dropout.seed_on(a.x.device())};
  call->scale = d.scale.defined() ? 1.0 : a.scale.number;
  int edges = 0;
  const Tensor* inputs[kLowRankInputs] = {&a.x, &a.weight, &a.add, &a.bias, &a.A, &a.B, &a.u, &a.v, &a.S};
  for (int i = 0; i < kLowRankInputs; ++i) call->edge[i] = inputs[i]->defined() ? edges++ : -1;
  return LowRank::apply(a.x, optional(a.weight), optional(a.add), optional(a.bias), optional(a.A), a.B, optional(a.u),
                        optional(a.v), optional(a.S), call, d);
}

}  // namespace peft_fused
