// The low-rank op as one autograd node. The composition is the one ops/lowrank_torch.py explains; here it is made of
// ATen calls without Python between them, and on CUDA the product with A is csrc/kernels/lowrank.cu.
#include "lowrank.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "../dropout.h"
#include "../memory.h"

#ifdef PEFT_FUSED_CUDA
#include "../kernels/launch.h"
#endif

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Below this size the two layouts of dB's product cost the same and the direct one saves a transposition.
constexpr int64_t kSmallProduct = 1 << 16;

// ------------------------------------------------------------------------------------------------ which calls to take

bool same(const Tensor& t, const Tensor& like, at::ScalarType type) {
  return !t.defined() || (plain(t) && t.device() == like.device() && t.scalar_type() == type);
}

bool is_control(const Control& c, const Tensor& x, bool integer) {
  if (!c.tensor.defined()) return true;
  return c.tensor.dim() == 0 && c.tensor.device() == x.device() && plain(c.tensor) && !c.tensor.requires_grad() &&
         (integer ? c10::isIntegralType(c.tensor.scalar_type(), /*includeBool=*/false)
                  : c10::isFloatingType(c.tensor.scalar_type()));
}

// A control on the CPU is read; one on a device stays there.
void read_on_host(Control& c) {
  if (c.tensor.defined() && c.tensor.is_cpu()) {
    c.number = c.tensor.item().toDouble();
    c.tensor = Tensor();
  }
}

bool in_range(const Control& c, int64_t least, int64_t most) {
  return c.tensor.defined() || (c.number >= least && c.number <= most);
}

}  // namespace

bool lowrank_serves(bool cuda, at::ScalarType type, at::ScalarType adapter, bool uv, double multiply_adds,
                    const std::string& backend) {
  if (cuda && type == at::kDouble) return false;
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf && type != at::kDouble) return false;
  if (cuda && backend == "cuda") return true;
  if (!backend.empty() && (cuda || backend != "torch")) return false;
  // Folded into B, u, v and scale may leave fp16's range: Python widens the factors.
  if (uv && adapter == at::kHalf) return false;
  // Other kernels take more of the GPU's time for launching than for working below this size, and for products of mixed
  // types this node converts the larger operand.
  return !cuda || (adapter == type && multiply_adds < settings().launch_bound);
}

namespace {

bool takes(LowRankArguments& a, const std::string& backend) {
  const Tensor &x = a.x, &A = a.A, &B = a.B;
  // A dispatch mode (selective checkpointing, fake tensors, counters) would see the pieces of this node and take them for
  // the user's operations; the registered op is one piece.
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  if (!plain(x) || !plain(A) || !plain(B)) return false;
  if (x.dim() < 1 || (A.dim() != 2 && A.dim() != 3) || (B.dim() != 2 && B.dim() != 3)) return false;
  const auto type = x.scalar_type();
  const int64_t k = x.size(-1), r = A.size(-2), n = B.size(-2);
  const auto adapter = A.scalar_type();
#ifdef PEFT_FUSED_CUDA
  if (!x.is_cpu() && !x.is_cuda()) return false;
#else
  if (!x.is_cpu()) return false;
#endif
  if (!lowrank_serves(x.is_cuda(), type, adapter, a.u.defined() || a.v.defined(), static_cast<double>(x.numel()) * n,
                      backend))
    return false;
  if (at::autocast::is_autocast_enabled(x.device().type())) return false;
  if (adapter != type && (adapter != at::kFloat || type == at::kDouble)) return false;
  if (!same(A, x, adapter) || !same(B, x, adapter) || !same(a.u, x, adapter) || !same(a.v, x, adapter)) return false;
  if (!same(a.weight, x, type) || !same(a.bias, x, type) || !same(a.add, x, type)) return false;
  if (r < 1 || r > kMaxRank || A.size(-1) != k || B.size(-1) != r) return false;
  if (a.weight.defined() && (a.weight.dim() != 2 || a.weight.size(0) != n || a.weight.size(1) != k)) return false;
  if (a.bias.defined() && (a.bias.dim() != 1 || a.bias.size(0) != n)) return false;
  if (a.u.defined() && (a.u.dim() != 1 || a.u.size(0) != r)) return false;
  if (a.v.defined() && (a.v.dim() != 1 || a.v.size(0) != n)) return false;
  if (a.add.defined()) {
    if (a.add.dim() != x.dim() || a.add.size(-1) != n) return false;
    for (int64_t i = 0; i + 1 < x.dim(); ++i)
      if (a.add.size(i) != x.size(i)) return false;
  }

  if (!(a.dropout_p >= 0 && a.dropout_p < 1)) return false;
  if (a.seed_tensor.defined() &&
      (!plain(a.seed_tensor) || a.seed_tensor.dim() != 0 || a.seed_tensor.scalar_type() != at::kLong || a.seed_tensor.device() != x.device()))
    return false;
  if (!is_control(a.scale, x, false) || !is_control(a.rank, x, true)) return false;
  if (!is_control(a.expert_a, x, true) || !is_control(a.expert_b, x, true)) return false;
  if ((a.has_expert_a || a.has_expert_b) && A.dim() == 2 && B.dim() == 2) return false;
  read_on_host(a.scale);
  read_on_host(a.rank);
  read_on_host(a.expert_a);
  read_on_host(a.expert_b);
  if (!a.has_rank) a.rank.number = static_cast<double>(r);
  if (!finite(a.scale.number, type) || !in_range(a.rank, 1, r)) return false;
  if (A.dim() == 3 && !in_range(a.expert_a, 0, A.size(0) - 1)) return false;
  if (B.dim() == 3 && !in_range(a.expert_b, 0, B.size(0) - 1)) return false;
  return true;
}

// ------------------------------------------------------------------------------------------------------------ pieces

enum Input { kX, kWeight, kAdd, kBias, kA, kB, kU, kV, kInputs };

// Everything backward needs that is no tensor to be differentiated.
struct Call : torch::CustomClassHolder {
  double scale = 1;
  int64_t rank = 0, expert_a = 0, expert_b = 0, threshold = 0;
  bool frozen = false, mixed = false;
  bool grad = false;  // whether autograd records the call
  // Position of each input among the tensors that are present, as the node numbers its edges; -1 for an absent one.
  int edge[kInputs];
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

  Adapter(const Tensor& a, const Tensor& b, const Tensor& u_, const Tensor& v_, const Call& c, const Device& d)
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
Tensor shrink_cuda(const Tensor& x2, const Tensor& A_stack, const Adapter& ad, const Call& c, const Device& d) {
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

// y [m, n] = (x W^T | add) + bias + scale * v . B (u . S), and S.
std::pair<Tensor, Tensor> adapt(const Tensor& x2, const Tensor& weight, const Tensor& add2, const Tensor& bias,
                                const Tensor& A_stack, const Adapter& ad, const Call& c, const Device& d) {
  const int64_t m = x2.size(0), n = ad.B.size(0);
  const bool base_first = weight.defined() && uses_onednn(x2, weight.t());
  const Tensor y = base_first ? onednn_linear(x2, weight, bias) : at::empty({m, n}, x2.options());
  const Tensor Q = ad.outer(d).t();
  Tensor S;
  bool have_S = false;
#ifdef PEFT_FUSED_CUDA
  if (x2.is_cuda()) {
    S = shrink_cuda(x2, A_stack, ad, c, d);
    have_S = true;
  }
#endif
  const Blocks blocks(x2, std::max(x2.size(1), n), c.mixed || c.threshold > 0);
  if (!blocks.whole() && !have_S) S = at::empty({m, ad.width}, ad.A.options());
  for (int64_t i = 0; i < blocks.count; ++i) {
    Tensor P = have_S ? blocks.of(S, i) : product(blocks.load(x2, i, ad.A.scalar_type(), c.threshold, d.seed), ad.A.t(), 1);
    if (!have_S) {
      P = ad.mask(P);
      if (blocks.whole()) {
        S = P;
      } else {
        blocks.of(S, i).copy_(P);
      }
    }
    Tensor rows = blocks.of(y, i);
    const Tensor onto = base_first ? rows : blocks.of(add2, i);
    if (c.mixed) {
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
  if (weight.defined() && !base_first) y.addmm_(x2, weight.t());
  return {y, S};
}

// The gradient of the live rows (columns) of a factor, in a tensor like the factor, zero elsewhere.
Tensor place(Tensor grad, const Tensor& factor, int64_t expert, const Tensor& device_expert, const Call& c,
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

// -------------------------------------------------------------------------------------------------------------- node

struct LowRank : torch::autograd::Function<LowRank> {
  using Optional = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& weight_, const Optional& add_,
                        const Optional& bias_, const Tensor& A, const Tensor& B, const Optional& u_,
                        const Optional& v_, const c10::intrusive_ptr<Call>& call, const Device& d) {
    const BelowAutograd guard;
    const Call& c = *call;
    const auto get = [](const Optional& t) { return t ? *t : Tensor(); };
    const Tensor weight = get(weight_), add = get(add_), bias = get(bias_), u = get(u_), v = get(v_);
    const Adapter ad(A, B, u, v, c, d);
    const Tensor x2 = rows_of(x);
    const auto [y, S] = adapt(x2, weight, add.defined() ? rows_of(add) : add, bias, A, ad, c, d);
    const auto needs = [&](const Tensor& t) { return c.grad && t.defined() && t.requires_grad(); };
    const bool keeps_x = needs(A) || needs(weight), keeps_A = needs(A) || needs(x);
    const bool keeps_S = needs(B) || needs(u) || needs(v), keeps_adapter = keeps_A || keeps_S;
    const bool any = keeps_x || keeps_adapter;
    ctx->save_for_backward({kept(keeps_x, x, "x"), kept(needs(x), weight, "weight"), kept(keeps_A, A, "A"),
                            kept(keeps_adapter, B, "B"), kept(keeps_adapter, u, "u"), kept(keeps_adapter, v, "v"),
                            kept(keeps_S, S, "S"), kept(any, d.scale, "scale"), kept(any, d.rank, "rank"),
                            kept(any, d.expert_a, "expert"), kept(any, d.expert_b, "expert"),
                            kept(any, d.seed, "seed")});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return unflatten(y, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list out(kInputs + 2);
    if (!grads[0].defined()) return out;
    const Tensor dy = readable(grads[0], "the gradient of the output");
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "peft_fused: the low-rank op has no second derivative; use_backend('reference') has one");
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const Call& c = *call;
    const auto saved = saved_of(ctx, {"x", "weight", "A", "B", "u", "v", "S", "scale", "rank", "expert", "expert",
                                      "seed"});
    const BelowAutograd guard;
    const Tensor &x = saved[0], &weight = saved[1], &A = saved[2], &B = saved[3], &u = saved[4], &v = saved[5];
    const Device d{saved[7], saved[8], saved[9], saved[10], saved[11]};
    const auto need = [&](Input i) { return c.edge[i] >= 0 && ctx->needs_input_grad(c.edge[i]); };

    const Adapter ad(A, B, u, v, c, d);
    const Tensor dy2 = rows_of(dy);
    const int64_t m = dy2.size(0), n = dy2.size(1), k = A.defined() ? A.size(-1) : 0, width = ad.width;
    auto of_x = dy.sizes().vec();
    of_x.back() = k;
    if (need(kBias)) out[kBias] = dy2.sum(0);
    if (need(kAdd)) out[kAdd] = dy;
    if (m == 0) {  // zeros times a factor that is not finite would be NaN
      const auto zeros = [&](Input i, const Tensor& t) { if (need(i)) out[i] = at::zeros(t.sizes(), t.options()); };
      zeros(kA, A);
      zeros(kB, B);
      zeros(kU, u);
      zeros(kV, v);
      if (need(kWeight)) out[kWeight] = at::zeros({n, x.size(-1)}, x.options());
      if (need(kX)) out[kX] = at::empty(of_x, dy.options());
      return out;
    }
    const bool need_dS = need(kX) || need(kA), need_raw = need(kB) || need(kU) || need(kV);
    const Tensor S = saved[6];

    // Per block of rows, from one visit of dY and one of x: dS, and the block's share of dY^T S, dA and dx.
    const auto type = B.defined() ? B.scalar_type() : dy2.scalar_type();
    const bool blocked = c.mixed || c.threshold > 0;
    const Blocks blocks(dy2, std::max(n, k), blocked);
    const Tensor x2 = x.defined() ? rows_of(x) : x;
    const Tensor outer = need_dS ? ad.mask(ad.outer(d)) : Tensor();
    const bool base_first = need(kX) && weight.defined() && uses_onednn(dy2, weight);
    Tensor dx;
    if (need(kX)) dx = base_first ? onednn_linear(dy2, weight.t(), Tensor()) : at::empty({m, k}, dy2.options());
    Tensor raw, dA;
    const bool raw_transposed = m * n > kSmallProduct;
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Tensor dyi = blocks.of(dy2, i).to(type), Si = blocks.of(S, i);
      if (need_raw) {
        accumulate(raw, raw_transposed ? product(Si.t(), dyi, c.scale) : product(dyi.t(), Si, c.scale));
      }
      if (!need_dS) continue;
      const Tensor dS = product(dyi, outer, c.scale);
      if (need(kA)) accumulate(dA, product(dS.t(), blocks.load(x2, i, type, c.threshold, d.seed), 1));
      if (need(kX)) {
        Tensor out_rows = blocks.of(dx, i);
        if (!base_first && !c.mixed) {
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
    if (need(kX)) {
      if (weight.defined() && !base_first) dx.addmm_(dy2, weight);
      out[kX] = dx.view(of_x);
    }
    return out;
  }
};

}  // namespace

Tensor lowrank(LowRankArguments a, const std::string& backend) {
  if (!takes(a, backend)) return Tensor();
  auto call = c10::make_intrusive<Call>();
  call->scale = a.scale.tensor.defined() ? 1.0 : a.scale.number;
  call->rank = static_cast<int64_t>(a.rank.number);
  call->expert_a = static_cast<int64_t>(a.expert_a.number);
  call->expert_b = static_cast<int64_t>(a.expert_b.number);
  call->threshold = std::min<int64_t>(65535, std::llrint(a.dropout_p * 65536.0));
  call->frozen = a.frozen;
  call->grad = at::GradMode::is_enabled();
  call->mixed = a.A.scalar_type() != a.x.scalar_type();
  Device d{a.scale.tensor, a.rank.tensor, a.expert_a.tensor, a.expert_b.tensor, Tensor()};
  if (call->threshold > 0) {
    const auto options = at::TensorOptions().dtype(at::kLong).device(a.x.device());
    d.seed = a.seed_tensor.defined() ? a.seed_tensor
             : a.seed                ? at::full({}, *a.seed, options)
                                     : at::randint(0, std::numeric_limits<int64_t>::max(), {}, options);
  }
  int edges = 0;
  const Tensor* inputs[kInputs] = {&a.x, &a.weight, &a.add, &a.bias, &a.A, &a.B, &a.u, &a.v};
  for (int i = 0; i < kInputs; ++i) call->edge[i] = inputs[i]->defined() ? edges++ : -1;
  return LowRank::apply(a.x, optional(a.weight), optional(a.add), optional(a.bias), a.A, a.B, optional(a.u),
                        optional(a.v), call, d);
}

}  // namespace peft_fused
