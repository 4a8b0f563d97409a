#include "bottleneck_triton.h"

#include <c10/core/DeviceGuard.h>

#include <numeric>

#include "../triton_launch/launch.h"
#include "launching.h"

namespace peft_fused {
namespace {

using at::Tensor;
using triton::Launch;

// An expert index as the kernels take it: of each group with a stride, otherwise of all rows.
struct Route {
  Tensor pointer;
  int64_t value = 0, stride = 0, groups = 1;

  Route(bool stacked, const Control& expert) {
    if (!stacked) return;
    pointer = expert.tensor;
    value = whole(expert);
    if (!pointer.defined() || pointer.numel() == 1) return;
    stride = pointer.stride(0);
    groups = pointer.size(0);
  }
  // One index per group leaves nothing to choose: there is a slot for each expert, or one expert in all.
  Tensor chosen() const { return groups == 1 ? pointer : Tensor(); }
  int64_t chosen_value() const { return groups == 1 ? value : 0; }
};

// Both sides with an index for as many groups, or with one.
void spread(Control& a, Control& b) {
  const auto per_group = [](const Control& e) { return e.tensor.defined() && e.tensor.dim() == 1; };
  int64_t groups = 1;
  for (const Control* e : {&a, &b})
    if (per_group(*e)) groups = std::lcm(groups, e->tensor.size(0));
  for (Control* e : {&a, &b})
    if (per_group(*e) && e->tensor.size(0) != groups)
      e->tensor = e->tensor.unsqueeze(1).expand({-1, groups / e->tensor.size(0)}).flatten();
}

int64_t bias_stride(const Tensor& bias) { return bias.defined() && bias.dim() == 2 ? bias.stride(0) : 0; }

struct RowsOperands {
  Tensor x, w_in, b_in, w_out, b_out, add, z, s, a, y;
  Strides in, out;  // w_in [expert, unit, column of x], w_out [expert, column of y, unit]
  int64_t m = 0, r = 0;
  bool backward = false;
};

void launch_rows(const BottleneckRowsLaunch& launch, int64_t groups, const BottleneckTritonCall& c,
                 const RowsOperands& t, const Route& route_in, const Route& route_out) {
  const Tensor b_in = dense(t.b_in), b_out = dense(t.b_out);
  const int64_t k = t.x.defined() ? t.x.size(1) : 0, n = t.y.defined() ? t.y.size(1) : 0;
  const int64_t group_rows = t.m / groups, row_blocks = cdiv(group_rows, launch.block_m);
  const int64_t n_blocks = cdiv(cdiv(n, launch.block_n), launch.splits);
  const int64_t splits = launch.expand ? cdiv(cdiv(n, launch.block_n), n_blocks) : 1;
  Launch one(triton::kRows, t.z.defined() ? t.z.device() : t.x.device());
  one.pointers(t.x, t.w_in, b_in, t.w_out, b_out, t.add, t.z, t.s, t.a, t.y, c.scale.tensor, route_in.pointer,
               route_out.pointer)
      .integers(group_rows, row_blocks, k, n, t.r)
      .number(number(c.scale))
      .integers(route_in.value, route_out.value, n_blocks, route_in.stride, route_out.stride,
                t.x.defined() ? t.x.stride(0) : 0, t.x.defined() ? t.x.stride(1) : 0, t.in.expert, t.in.row,
                t.in.column, bias_stride(b_in), t.out.expert, t.out.row, t.out.column, bias_stride(b_out),
                t.add.defined() ? t.add.stride(0) : 0, t.add.defined() ? t.add.stride(1) : 0)
      .flag(t.backward)
      .flag(launch.shrink)
      .flag(launch.expand)
      .word(c.activation)
      .word(c.precision)
      .constants(launch.block_m, launch.block_k, launch.block_n, launch.block_r)
      .run({groups * row_blocks, splits, launch.expand ? 1 : cdiv(t.r, launch.block_r)},
           {launch.num_warps, launch.num_stages, launch.maxnreg});
}

// Partial sums of a factor's gradient [experts, width, r] and of its bias', and where their sums go.
struct FactorSums {
  Tensor partials, vectors, weight, bias;
  Strides strides;
  const Route* route = nullptr;
  int64_t experts = 0, slots = 1, row_splits = 0, width = 1;

  Tensor index() const { return route != nullptr ? route->chosen() : Tensor(); }
  int64_t value() const { return route != nullptr ? route->chosen_value() : 0; }
};

// First stage of weight [E, X, r] = x^T s and of one bias, the column sums of x or of s; undefined for what is not needed.
FactorSums sums_of(const BottleneckGradLaunch& launch, const Tensor& x, const Tensor& s, const Route& route,
             const Tensor& weight, const Strides& strides, const Tensor& bias, bool of_units, int64_t stack,
             int precision) {
  const Tensor& like = x.defined() ? x : s;
  const int64_t m = like.size(0), width = x.defined() ? x.size(1) : 1, r = s.defined() ? s.size(1) : 1;
  FactorSums out;
  out.weight = weight, out.strides = strides, out.bias = bias, out.route = &route, out.width = width;
  out.experts = std::max<int64_t>(1, stack);
  out.slots = route.groups > 1 ? out.experts : 1;
  const int64_t groups = out.slots > 1 ? route.groups : 1, group_rows = m / groups;
  const int64_t row_blocks = cdiv(group_rows, launch.block_m), blocks = groups * row_blocks;
  const int64_t split_blocks = cdiv(blocks, launch.splits);
  out.row_splits = cdiv(blocks, split_blocks);
  const auto options = like.options().dtype(at::kFloat);
  if (weight.defined()) out.partials = at::empty({out.slots, out.row_splits, width, r}, options);
  if (bias.defined()) out.vectors = at::empty({out.slots, out.row_splits, of_units ? r : width}, options);
  const Tensor none;
  Launch one(triton::kGrad, like.device());
  one.pointers(x, s, out.partials, of_units ? none : out.vectors, of_units ? out.vectors : none,
               out.slots > 1 ? route.pointer : none)
      .integers(group_rows, row_blocks, blocks, split_blocks, width, r, route.stride, x.defined() ? x.stride(0) : 0,
                x.defined() ? x.stride(1) : 0)
      .word(precision)
      .constants(launch.block_m, launch.block_x, launch.block_r)
      .run({cdiv(width, launch.block_x), out.row_splits, out.slots * cdiv(r, launch.block_r)},
           {launch.num_warps, launch.num_stages, launch.maxnreg});
  return out;
}

// Second stage: one launch for both factors.
void reduce(const FactorSums& down, const FactorSums& up, int64_t r, const Control& scale, const at::Device& device,
            const BottleneckPlan& plan) {
  const int64_t down_programs = down.experts * cdiv(down.width, plan.reduce_x);
  const int64_t up_programs = up.experts * cdiv(up.width, plan.reduce_x);
  Launch one(triton::kBottleneckReduce, device);
  one.pointers(down.partials, down.vectors, down.weight, down.bias, down.index(), up.partials, up.vectors, up.weight,
               up.bias, up.index(), scale.tensor)
      .integers(down_programs, r)
      .number(number(scale))
      .integers(down.value(), down.slots, down.row_splits, down.width, down.strides.expert, down.strides.row,
                down.strides.column, up.value(), up.slots, up.row_splits, up.width, up.strides.expert, up.strides.row,
                up.strides.column)
      .constants(plan.reduce_p, plan.reduce_x, plan.reduce_r)
      .run({down_programs + up_programs, 1, 1}, {plan.reduce_warps, 1, 0});
}

}  // namespace

std::pair<Tensor, Tensor> bottleneck_triton_fwd(const BottleneckTritonCall& c, const BottleneckPlan& plan) {
  const int64_t m = c.h.size(0), n = c.up.size(-2), r = c.up.size(-1);
  const c10::DeviceGuard guard(c.h.device());
  Control expert_d = c.expert_d, expert_u = c.expert_u;
  spread(expert_d, expert_u);
  const Route route_d(c.down.dim() == 3, expert_d), route_u(c.up.dim() == 3, expert_u);
  const int64_t groups = std::max(route_d.groups, route_u.groups);
  RowsOperands t;
  t.m = m, t.r = r;
  t.x = c.h, t.w_in = c.down, t.b_in = c.down_bias, t.w_out = c.up, t.b_out = c.up_bias;
  t.in = Strides(c.down), t.out = Strides(c.up);
  t.add = c.residual.defined() ? c.residual : c.h;
  t.y = at::empty({m, n}, c.h.options()), t.z = at::empty({m, r}, c.down.options());
  if (plan.forward.size() > 1) t.s = at::empty_like(t.z);
  for (const auto& launch : plan.forward) launch_rows(launch, groups, c, t, route_d, route_u);
  return {t.y, t.z};
}

BottleneckGrads bottleneck_triton_bwd(const Tensor& dy, const BottleneckTritonCall& c, const Tensor& z,
                                      const BottleneckShape& shape, const BottleneckNeeds& needs,
                                      const BottleneckPlan& plan) {
  const int64_t m = dy.size(0), r = shape.r;
  const c10::DeviceGuard guard(dy.device());
  const auto options = dy.options().dtype(shape.type);
  const auto stacked = [](int64_t stack, std::vector<int64_t> sizes) {
    if (stack > 0) sizes.insert(sizes.begin(), stack);
    return sizes;
  };
  BottleneckGrads out;
  if (needs.down) out.down = at::empty(stacked(shape.stack_d, {r, shape.k}), options);
  if (needs.down_bias) out.down_bias = at::empty(stacked(shape.stack_d, {r}), options);
  if (needs.up) out.up = at::empty(stacked(shape.stack_u, {shape.n, r}), options);
  if (needs.up_bias) out.up_bias = at::empty(stacked(shape.stack_u, {shape.n}), options);
  if (needs.h) out.h = at::empty({m, shape.k}, dy.options());

  Control expert_d = c.expert_d, expert_u = c.expert_u;
  spread(expert_d, expert_u);
  const Route route_d(shape.stack_d > 0, expert_d), route_u(shape.stack_u > 0, expert_u);
  const int64_t groups = std::max(route_d.groups, route_u.groups);
  const bool need_units = needs.down || needs.down_bias, need_dz = need_units || needs.h;
  auto launches = plan.backward;
  if (!needs.h) {
    launches.resize(1);
    launches[0].expand = false, launches[0].splits = 1;
    if (!need_dz && !needs.up) launches.clear();
  }
  Tensor dz, a;
  if (need_units || launches.size() > 1) dz = at::empty({m, r}, options);
  if (needs.up) a = at::empty({m, r}, options);
  RowsOperands t;
  t.backward = true;
  t.m = m, t.r = r;
  if (need_dz) t.x = dy;
  t.w_in = c.up, t.w_out = c.down;
  t.in = Strides(c.up).transposed(), t.out = Strides(c.down).transposed();
  if (shape.residual_is_h) t.add = dy;
  t.z = z, t.s = dz, t.a = a, t.y = out.h;
  for (const auto& launch : launches) launch_rows(launch, groups, c, t, route_u, route_d);

  FactorSums down, up;
  if (need_units) {
    down = sums_of(plan.grad_down, needs.down ? c.h : Tensor(), dz, route_d, out.down, Strides(out.down).transposed(),
                   out.down_bias, /*of_units=*/true, shape.stack_d, c.precision);
  }
  if (needs.up || needs.up_bias) {
    up = sums_of(plan.grad_up, dy, a, route_u, out.up, Strides(out.up), out.up_bias, /*of_units=*/false, shape.stack_u,
                 c.precision);
  }
  if (down.experts + up.experts > 0) reduce(down, up, r, c.scale, dy.device(), plan);
  return out;
}

}  // namespace peft_fused
