// The bottleneck op as one autograd node. The composition is the one ops/bottleneck_torch.py explains; here it is made
// of ATen calls without Python between them, and a block of rows passes both products before the next one.
#include "bottleneck.h"

#include <torch/csrc/autograd/custom_function.h>

#include <numeric>
#include <optional>
#include <vector>

#include "../memory.h"

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum class Activation { gelu, gelu_tanh, relu, silu, tanh, identity };
// What the kernels are compiled for, in this order: words of triton_launch.
constexpr int kFirstActivation = 2;

std::optional<Activation> activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu" || name == "swish") return Activation::silu;
  if (name == "tanh") return Activation::tanh;
  if (name == "identity") return Activation::identity;
  return std::nullopt;
}

Tensor activate(Activation activation, const Tensor& z) {
  switch (activation) {
    case Activation::gelu: return at::gelu(z);
    case Activation::gelu_tanh: return at::gelu(z, "tanh");
    case Activation::relu: return at::relu(z);
    case Activation::silu: return at::silu(z);
    case Activation::tanh: return at::tanh(z);
    case Activation::identity: return z;
  }
  return Tensor();
}

// dz from da and z, which the identity does not read.
Tensor derive(Activation activation, const Tensor& da, const Tensor& z) {
  switch (activation) {
    case Activation::gelu: return at::gelu_backward(da, z);
    case Activation::gelu_tanh: return at::gelu_backward(da, z, "tanh");
    case Activation::relu: return at::threshold_backward(da, z, 0);
    case Activation::silu: return at::silu_backward(da, z);
    case Activation::tanh: return at::tanh_backward(da, at::tanh(z));
    case Activation::identity: return da;
  }
  return Tensor();
}

// Everything backward needs that is no tensor to be differentiated.
enum BottleneckInput { kH, kDown, kDownBias, kUp, kUpBias, kResidual, kBottleneckInputs };
struct BottleneckCall : torch::CustomClassHolder {
  Activation activation;
  double scale;
  std::vector<int64_t> expert_d, expert_u;  // one, or one per group of rows
  int64_t stack_d, stack_u, r, k;           // experts in a stack (0: none), units, features of h
  at::ScalarType type;                      // of the parameters
  bool residual_is_h;
  bool grad;  // whether autograd records the call
  c10::intrusive_ptr<BottleneckOnTriton> on_triton;
  // Position of each input among the tensors that are present, as the node numbers its edges; -1 for an absent one.
  int edge[kBottleneckInputs];
};

struct BottleneckDevice {  // controls that stay on the device, for Triton's kernels
  Control scale, expert_d, expert_u;
};

BottleneckTritonCall triton_call(const Tensor& h2, const Tensor& down, const Tensor& down_bias, const Tensor& up,
                                 const Tensor& up_bias, const Tensor& residual2, const BottleneckCall& c,
                                 const BottleneckDevice& d) {
  return {h2, down, down_bias, up, up_bias, residual2, d.scale, d.expert_d, d.expert_u,
          kFirstActivation + static_cast<int>(c.activation), c.on_triton->precision};
}

// ------------------------------------------------------------------------------------------------------------ pieces

// Rows that are worked on at a time: of one pair of experts, and in blocks where they are converted.
struct Piece {
  int64_t first, count, down, up;
  Tensor of(const Tensor& t) const { return t.defined() && count != t.size(0) ? t.narrow(0, first, count) : t; }
};

std::vector<Piece> pieces_of(const BottleneckCall& c, int64_t rows, int64_t columns, bool blocked) {
  const int64_t down = static_cast<int64_t>(c.expert_d.size()), up = static_cast<int64_t>(c.expert_u.size());
  const int64_t groups = std::lcm(down, up), size = rows / groups;
  std::vector<Piece> spans;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t d = c.expert_d[g * down / groups], u = c.expert_u[g * up / groups];
    if (!spans.empty() && spans.back().down == d && spans.back().up == u) {
      spans.back().count += size;
    } else {
      spans.push_back({g * size, size, d, u});
    }
  }
  if (!blocked) return spans;
  const int64_t step = std::max<int64_t>(1, Blocks::kElementsCpu / std::max<int64_t>(1, columns));
  std::vector<Piece> blocks;
  for (const Piece& span : spans)
    for (int64_t i = 0; i < std::max<int64_t>(1, span.count); i += step)
      blocks.push_back({span.first + i, std::min(step, span.count - i), span.down, span.up});
  return blocks;
}

Tensor expert_of(const Tensor& parameter, int64_t stack, int64_t index) {
  return parameter.defined() && stack > 0 ? parameter.select(0, index) : parameter;
}

// The gradient of a parameter or of a stack of them, added up over the pieces in their order.
struct Sum {
  int64_t stack;
  Tensor total;

  void add(int64_t index, const Tensor& part) {
    if (stack == 0) return accumulate(total, part);
    if (!total.defined()) {
      auto shape = part.sizes().vec();
      shape.insert(shape.begin(), stack);
      // Several pieces may meet in one expert: they are added up in fp32 at least and rounded once.
      total = at::zeros(shape, part.options().dtype(at::promote_types(part.scalar_type(), at::kFloat)));
    }
    total.select(0, index).add_(part);
  }
};

// -------------------------------------------------------------------------------------------------------------- node

struct Bottleneck : torch::autograd::Function<Bottleneck> {
  using Optional = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& h, const Tensor& down, const Optional& down_bias_,
                        const Tensor& up, const Optional& up_bias_, const Optional& residual_,
                        const c10::intrusive_ptr<BottleneckCall>& call, const BottleneckDevice& d) {
    const BelowAutograd guard;
    const BottleneckCall& c = *call;
    const Tensor down_bias = down_bias_.value_or(Tensor()), up_bias = up_bias_.value_or(Tensor());
    const Tensor h2 = rows_of(h), residual2 = residual_ ? rows_of(*residual_) : Tensor();
    Tensor y, z;
    if (c.on_triton) {
      const auto on_triton = triton_call(h2, down, down_bias, up, up_bias, residual2, c, d);
      std::tie(y, z) = bottleneck_triton_fwd(on_triton, c.on_triton->plan);
    } else {
      std::tie(y, z) = adapt(h2, down, down_bias, up, up_bias, residual2, c);
    }
    if (!c.grad) return unflatten(y, h);
    const auto needs = [&](const Tensor& t) { return t.defined() && t.requires_grad(); };
    const bool needs_dz = needs(h) || needs(down) || needs(down_bias);
    const bool keeps_z = needs(up) || (needs_dz && c.activation != Activation::identity);
    const bool any = needs_dz || needs(up) || needs(up_bias);
    const auto kept_control = [&](const Control& control, const char* name) {
      return kept(any && control.tensor.defined(), control.tensor, name);
    };
    ctx->save_for_backward({kept(needs(down), h, "h"), kept(needs(h), down, "down"), kept(needs_dz, up, "up"),
                            kept(keeps_z, z, "z"), kept_control(d.scale, "scale"), kept_control(d.expert_d, "expert"),
                            kept_control(d.expert_u, "expert")});
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return unflatten(y, h);
  }

  static std::pair<Tensor, Tensor> adapt(const Tensor& h2, const Tensor& down, const Tensor& down_bias,
                                         const Tensor& up, const Tensor& up_bias, const Tensor& residual2,
                                         const BottleneckCall& c) {
    const Tensor& start = residual2.defined() ? residual2 : h2;
    const int64_t m = h2.size(0), n = up.size(-2);
    const bool mixed = c.type != h2.scalar_type();
    const auto pieces = pieces_of(c, m, std::max(c.k, n), mixed);
    const Tensor y = at::empty({m, n}, h2.options());
    Tensor z;
    if (pieces.size() > 1) z = at::empty({m, c.r}, down.options());
    for (const Piece& piece : pieces) {
      const Tensor D = expert_of(down, c.stack_d, piece.down), b = expert_of(down_bias, c.stack_d, piece.down);
      const Tensor rows = piece.of(h2).to(c.type);
      const Tensor part = b.defined() ? at::addmm(b, rows, D.t()) : product(rows, D.t(), 1);
      pieces.size() > 1 ? piece.of(z).copy_(part) : z = part;
      const Tensor a = activate(c.activation, part);

      const Tensor U = expert_of(up, c.stack_u, piece.up), bias = expert_of(up_bias, c.stack_u, piece.up);
      Tensor out = piece.of(y);
      if (mixed) {
        Tensor delta = product(a, U.t(), c.scale);
        if (bias.defined()) delta.add_(bias, c.scale);
        out.copy_(delta.add_(piece.of(start)));
        continue;
      }
      if (uses_onednn(a, U.t())) {  // which accumulates no faster than a separate pass
        const Tensor P = c.scale == 1 ? a : a * c.scale;
        at::add_out(out, onednn_linear(P, U, bias.defined() ? bias * c.scale : bias), piece.of(start));
        continue;
      }
      bias.defined() ? at::add_out(out, piece.of(start), bias, c.scale) : out.copy_(piece.of(start));
      out.addmm_(a, U.t(), 1, c.scale);
    }
    return {y, z};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // One gradient per argument of forward; what is no tensor, or absent, gets none.
    variable_list out(kBottleneckInputs + 2);
    if (!grads[0].defined()) return out;
    const Tensor dy = upstream(grads[0], "bottleneck");
    const auto call = call_of<BottleneckCall>(ctx);
    const BottleneckCall& c = *call;
    const auto saved = saved_of(ctx, {"h", "down", "up", "z", "scale", "expert", "expert"});
    const BelowAutograd guard;
    const Tensor &h = saved[0], &down = saved[1], &up = saved[2], &z = saved[3];
    const auto need = [&](BottleneckInput i) { return c.edge[i] >= 0 && ctx->needs_input_grad(c.edge[i]); };
    const bool need_dz = need(kH) || need(kDown) || need(kDownBias);
    if (need(kResidual)) out[kResidual] = dy;
    if (!need_dz && !need(kUp) && !need(kUpBias)) return out;

    const Tensor dy2 = rows_of(dy), h2 = need(kDown) ? rows_of(h) : Tensor();
    const int64_t m = dy2.size(0), n = dy2.size(1);
    if (c.on_triton) {
      const BottleneckDevice d{{saved[4], c.scale},
                               {saved[5], static_cast<double>(c.expert_d[0])},
                               {saved[6], static_cast<double>(c.expert_u[0])}};
      const auto on_triton = triton_call(h2, down, Tensor(), up, Tensor(), Tensor(), c, d);
      const BottleneckShape shape{c.stack_d, c.stack_u, c.r, c.k, n, c.type, c.residual_is_h};
      const BottleneckNeeds needs{need(kH), need(kDown), need(kDownBias), need(kUp), need(kUpBias)};
      const auto found = bottleneck_triton_bwd(dy2, on_triton, z, shape, needs, c.on_triton->plan);
      out[kDown] = found.down, out[kDownBias] = found.down_bias, out[kUp] = found.up, out[kUpBias] = found.up_bias;
      if (need(kH)) {
        auto sizes = dy.sizes().vec();
        sizes.back() = c.k;
        out[kH] = found.h.view(sizes);
      }
      return out;
    }
    const bool mixed = c.type != dy.scalar_type(), transposed = m * n > kSmallProduct;
    Tensor dh;
    if (need(kH)) dh = at::empty({m, c.k}, dy2.options());
    Sum d_down{c.stack_d, {}}, d_down_bias{c.stack_d, {}}, d_up{c.stack_u, {}}, d_up_bias{c.stack_u, {}};
    for (const Piece& piece : pieces_of(c, m, std::max(c.k, n), mixed)) {
      const Tensor rows = piece.of(dy2).to(c.type), zi = piece.of(z);
      if (need(kUp)) {
        const Tensor a = activate(c.activation, zi);
        d_up.add(piece.up, transposed ? product(a.t(), rows, c.scale) : product(rows.t(), a, c.scale));
      }
      if (need(kUpBias)) d_up_bias.add(piece.up, c.scale == 1 ? rows.sum(0) : rows.sum(0) * c.scale);
      if (!need_dz) continue;
      const Tensor dz = derive(c.activation, product(rows, expert_of(up, c.stack_u, piece.up), c.scale), zi);
      if (need(kDownBias)) d_down_bias.add(piece.down, dz.sum(0));
      if (need(kDown)) d_down.add(piece.down, product(dz.t(), piece.of(h2).to(c.type), 1));
      if (need(kH)) {
        const Tensor D = expert_of(down, c.stack_d, piece.down);
        Tensor out_rows = piece.of(dh);
        if (c.residual_is_h && !mixed && !uses_onednn(dz, D)) {
          at::addmm_out(out_rows, rows, dz, D);
        } else {
          Tensor back = product(dz, D, 1);
          out_rows.copy_(c.residual_is_h ? back.add_(rows) : back);
        }
      }
    }
    const auto finish = [&](const Sum& sum) { return sum.total.to(c.type).contiguous(); };
    if (need(kUp)) {
      if (transposed) d_up.total = d_up.total.transpose(-1, -2);
      out[kUp] = finish(d_up);
    }
    if (need(kUpBias)) out[kUpBias] = finish(d_up_bias);
    if (need(kDown)) out[kDown] = finish(d_down);
    if (need(kDownBias)) out[kDownBias] = finish(d_down_bias);
    if (need(kH)) {
      auto shape = dy.sizes().vec();
      shape.back() = c.k;
      out[kH] = dh.view(shape);
    }
    return out;
  }
};

// The indices of one side: one, or one per group of rows.
std::vector<int64_t> experts_of(const Control& control, const Tensor& weight, int64_t rows) {
  if (weight.dim() == 2) return {0};
  std::vector<int64_t> experts{static_cast<int64_t>(control.number)};
  if (control.tensor.defined()) {
    const Tensor flat = control.tensor.reshape({-1}).to(at::kLong).contiguous();
    TORCH_CHECK_VALUE(flat.is_cpu() && flat.numel() > 0 && rows % flat.numel() == 0,
                      "expert must have an index for each of equal groups of rows, got ", flat.sizes());
    experts.assign(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
  }
  for (const int64_t expert : experts)
    TORCH_CHECK_VALUE(expert >= 0 && expert < weight.size(0), "expert must be in 0..", weight.size(0) - 1, ", got ", expert);
  return experts;
}

}  // namespace

int activation_word(const std::string& name) {
  const auto activation = activation_of(name);
  TORCH_CHECK_VALUE(activation, "activation is unknown: ", name);
  return kFirstActivation + static_cast<int>(*activation);
}

void autocast(BottleneckArguments& a) {
  autocast(a.h, {&a.h, &a.residual}, {&a.down, &a.down_bias, &a.up, &a.up_bias});
}

Key key_of(BottleneckArguments& a) {
  Key key(a.h);
  for (const Tensor* t : {&a.h, &a.residual}) key.add(*t);
  for (const Tensor* t : {&a.down, &a.down_bias, &a.up, &a.up_bias}) key.add(*t, /*parameter=*/true);
  key.add(a.activation);
  key.add(a.scale);
  key.add(a.expert_d, a.has_expert_d);
  key.add(a.expert_u, a.has_expert_u);
  return key;
}

Tensor bottleneck(const BottleneckArguments& a, c10::intrusive_ptr<BottleneckOnTriton> on_triton) {
  const Tensor &h = a.h, &down = a.down, &up = a.up;
  TORCH_CHECK_VALUE(h.dim() >= 1 && (on_triton || h.is_cpu()) && down.dim() >= 2 && down.dim() <= 3 && up.dim() >= 2 && up.dim() <= 3,
                    "h, down and up must have 1, 2 or 3, and 2 or 3 dimensions, on the CPU");
  const auto activation = activation_of(a.activation);
  TORCH_CHECK_VALUE(activation, "activation is unknown: ", a.activation);
  const int64_t rows = c10::multiply_integers(h.sizes().slice(0, h.dim() - 1));
  auto call = c10::make_intrusive<BottleneckCall>();
  call->activation = *activation;
  call->scale = a.scale.number;
  BottleneckDevice d;
  if (on_triton) {
    const auto index = [](const Control& expert, const Tensor& weight) {
      return weight.dim() == 3 ? expert : Control{};  // that of a weight which is no stack is not used
    };
    d = {a.scale, index(a.expert_d, down), index(a.expert_u, up)};
    call->expert_d = {whole(d.expert_d)};
    call->expert_u = {whole(d.expert_u)};
    call->on_triton = std::move(on_triton);
  } else {
    call->expert_d = experts_of(a.expert_d, down, rows);
    call->expert_u = experts_of(a.expert_u, up, rows);
  }
  call->stack_d = down.dim() == 3 ? down.size(0) : 0;
  call->stack_u = up.dim() == 3 ? up.size(0) : 0;
  call->r = down.size(-2);
  call->k = h.size(-1);
  call->type = down.scalar_type();
  call->residual_is_h = !a.residual.defined();
  call->grad = at::GradMode::is_enabled();
  const Tensor* inputs[kBottleneckInputs] = {&h, &down, &a.down_bias, &up, &a.up_bias, &a.residual};
  int edges = 0;
  for (int i = 0; i < kBottleneckInputs; ++i) call->edge[i] = inputs[i]->defined() ? edges++ : -1;
  return Bottleneck::apply(h, down, optional(a.down_bias), up, optional(a.up_bias), optional(a.residual), call,
                           d);
}

}  // namespace peft_fused
