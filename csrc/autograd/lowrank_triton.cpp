#include "lowrank_triton.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../triton_launch/launch.h"
#include "launching.h"

namespace peft_fused {
namespace {

using at::Tensor;
using triton::Launch;

constexpr int64_t kGroupM = 8;  // GROUP_M of triton_kernels/lowrank_plan.py

// How the ranks of a product lie: R, of which each member has `each`. By itself a layer has all of them.
struct Ranks {
  int64_t R, each, members;
  Ranks(int64_t R, int64_t each, int64_t members) : R(R), each(each), members(members) {}
  explicit Ranks(const Tensor& S) : Ranks(S.size(-1), S.size(-1), 1) {}
  bool single() const { return each == R; }
  // Of blocks of x and of ranks; see block_of_ranks of the kernels.
  std::array<int64_t, 3> grid(int64_t blocks, int64_t splits, int64_t block_r) const {
    if (single()) return {blocks, splits, R / block_r};
    return {blocks * cdiv(members * each, block_r), splits, 1};
  }
};

// Of members' gradients there are none: their tensor is [members, m, each].
int64_t planes_of(const Tensor& t, const Ranks& ranks) { return t.dim() == 3 && ranks.single() ? t.size(0) : 1; }

// For a sum [m, R] that `count` programs share: whole, or planes of fp32.
Tensor planes(int64_t m, int64_t R, const at::TensorOptions& options, int64_t count) {
  return count == 1 ? at::empty({m, R}, options) : at::empty({count, m, R}, options.dtype(at::kFloat));
}

// Blocks of columns of each of a launch's planes.
int64_t column_blocks(int64_t columns, const LowRankLaunch& launch) {
  return cdiv(cdiv(columns, launch.block_n), launch.splits);
}

struct RowSplits {
  int64_t blocks, count;  // of rows per split, and splits
  RowSplits(int64_t rows, const LowRankLaunch& launch) {
    const int64_t all = cdiv(rows, launch.block_m);
    blocks = cdiv(all, launch.splits);
    count = cdiv(all, blocks);
  }
};

Tensor partial_sums(const Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().dtype(at::kFloat));
}

// ------------------------------------------------------------------------------------------------------------ launches

triton::Options options(const LowRankLaunch& launch) { return {launch.num_warps, launch.num_stages, launch.maxnreg}; }

void shrink(const Tensor& x, const Tensor& A, const Strides& s, int64_t r, const Tensor& v, const Tensor& out,
            const Control& scale, const Control& rank, const Control& expert, int64_t threshold, const Tensor& seed,
            int precision, const LowRankLaunch& launch, const Ranks& ranks) {
  const int64_t m = x.size(0), k = x.size(1);
  Launch one(triton::kShrink, x.device());
  one.pointers(x, A, v, out, scale.tensor, rank.tensor, expert.tensor, seed)
      .integers(m, k, r)
      .number(number(scale))
      .integers(whole(rank, r), whole(expert), threshold, column_blocks(k, launch), x.stride(0), x.stride(1),
                s.expert, s.row, s.column)
      .flag(threshold > 0)
      .flag(k % launch.block_n != 0)
      .word(precision)
      .constants(ranks.R, ranks.each, ranks.members, launch.block_m, launch.block_n, launch.block_r)
      .run(ranks.grid(cdiv(m, launch.block_m), launch.splits, launch.block_r), options(launch));
}

struct Expansion {
  Tensor u, v, bias, add, S, seed;
  Control scale{Tensor(), 1.0}, expert;
  int64_t threshold = 0;
};

void expand(const Tensor& in, const Tensor& B, const Strides& s, int64_t r, const Tensor& out, const Expansion& e,
            int precision, const LowRankLaunch& launch, const Ranks& ranks) {
  const int64_t m = out.size(0), n = out.size(1), n_blocks = column_blocks(n, launch);
  Launch one(triton::kExpand, out.device());
  one.pointers(in, B, dense(e.u), dense(e.v), dense(e.bias), e.add, out, e.S, e.scale.tensor, e.expert.tensor, e.seed)
      .integers(m, n, r)
      .number(number(e.scale))
      .integers(whole(e.expert), e.threshold, n_blocks, s.expert, s.row, s.column,
                e.add.defined() ? e.add.stride(0) : 0, e.add.defined() ? e.add.stride(1) : 0)
      .flag(e.threshold > 0)
      .flag(n % launch.block_n != 0)
      .word(precision)
      .constants(planes_of(in, ranks), ranks.R, ranks.each, ranks.members, launch.block_m, launch.block_n,
                 launch.block_r)
      .run({cdiv(m, launch.block_m) * cdiv(n, n_blocks * launch.block_n), 1, 1}, options(launch));
}

void linear(const LowRankTritonCall& c, const Tensor& y, const Tensor& S, const LowRankLaunch& launch) {
  const int64_t m = c.x.size(0), k = c.x.size(1), n = c.weight.size(0), r = c.A.size(-2);
  const Strides a(c.A), b(c.B);
  Launch one(triton::kLinear, y.device());
  one.pointers(c.x, c.weight, dense(c.bias), c.A, c.B, dense(c.u), dense(c.v), y, S, c.scale.tensor, c.rank.tensor,
               c.expert_a.tensor, c.expert_b.tensor)
      .integers(m, n, k, r)
      .number(number(c.scale))
      .integers(whole(c.rank, r), whole(c.expert_a), whole(c.expert_b), c.x.stride(0), c.x.stride(1),
                c.weight.stride(0), c.weight.stride(1), a.expert, a.row, a.column, b.expert, b.row, b.column)
      .flag(k % launch.block_k != 0)
      .word(c.precision)
      .constants(S.size(1), launch.block_m, launch.block_n, launch.block_k, kGroupM)
      .run({cdiv(m, launch.block_m) * cdiv(n, launch.block_n), 1, 1}, options(launch));
}

void one_pass_b(const Tensor& dy, const LowRankTritonCall& c, const Tensor& S, const Tensor& dSu,
                const Tensor& partials, const Tensor& sums, const LowRankLaunch& launch) {
  const int64_t m = dy.size(0), n = dy.size(1), r = c.B.size(-1);
  const Strides s(c.B);
  Launch one(triton::kGradB, dy.device());
  one.pointers(dy, c.B, S, dense(c.v), dSu, partials, sums, c.scale.tensor, c.rank.tensor, c.expert_b.tensor)
      .integers(m, n, r)
      .number(number(c.scale))
      .integers(whole(c.rank, r), whole(c.expert_b), column_blocks(n, launch), dy.stride(0), dy.stride(1), s.expert,
                s.row, s.column)
      .flag(n % launch.block_n != 0)
      .word(c.precision)
      .constants(dSu.size(-1), launch.block_m, launch.block_n)
      .run({cdiv(m, launch.block_m), launch.splits, 1}, options(launch));
}

struct OverRows {
  Tensor A, S, u, dx, partials, dots, sums, seed;
  Control expert;
  int64_t threshold = 0;
};

// grad_a_kernel; also dB's partials and the bias sums, with x := dY and dSu := S.
void over_rows(const Tensor& x, int64_t k, const Tensor& dSu, int64_t r, at::ScalarType type, const OverRows& o,
               int precision, const LowRankLaunch& launch, const Ranks& ranks) {
  const int64_t m = dSu.size(-2);
  const RowSplits splits(m, launch);
  const Strides s(o.A);
  const int64_t columns = o.dx.defined() || o.partials.defined() ? cdiv(k, launch.block_n) : 1;
  Launch one(triton::kGradA, dSu.device());
  one.pointers(x, dSu, o.A, o.S, o.u, o.dx, o.partials, o.dots, o.sums, o.expert.tensor, o.seed)
      .integers(m, k, r, whole(o.expert), o.threshold, splits.blocks, x.defined() ? x.stride(0) : 0,
                x.defined() ? x.stride(1) : 0, s.expert, s.row, s.column)
      .flag(o.dx.defined())
      .flag(o.partials.defined())
      .flag(o.threshold > 0)
      .flag(k % launch.block_n != 0)
      .word(precision)
      .type(type)
      .constants(planes_of(dSu, ranks), ranks.R, ranks.each, ranks.members, launch.block_m, launch.block_n,
                 launch.block_r)
      .run(ranks.grid(columns, splits.count, launch.block_r), options(launch));
}

struct Sums {
  Tensor of_b, of_bias, of_a, of_u;
};

// The second stage of every sum over the rows.
void reduce(const LowRankTritonCall& c, int64_t n, int64_t k, const Sums& sums, const LowRankGrads& out,
            const LowRankLaunch& launch) {
  const auto count = [](const Tensor& a, const Tensor& b) { return a.defined() ? a.size(0) : b.defined() ? b.size(0) : 0; };
  const int64_t count_b = count(sums.of_b, sums.of_bias), count_a = count(sums.of_a, sums.of_u);
  if (count_b == 0 && count_a == 0) return;
  const int64_t r = c.B.size(-1);
  const int64_t blocks = (count_b ? cdiv(n, launch.block_n) : 0) +
                         (sums.of_a.defined() ? cdiv(k, launch.block_n) : static_cast<int64_t>(sums.of_u.defined()));
  const Strides b(c.B), db(out.B), da(out.A);
  Launch one(triton::kReduce, c.B.device());
  one.pointers(sums.of_b, sums.of_bias, c.B, dense(c.v), out.B, out.v, sums.of_bias.defined() ? out.bias : Tensor(),
               sums.of_a, sums.of_u, dense(c.u), out.A, out.u, c.scale.tensor, c.rank.tensor, c.expert_a.tensor,
               c.expert_b.tensor)
      .integers(count_b, count_a, n, k, r)
      .number(number(c.scale))
      .integers(whole(c.rank, r), whole(c.expert_a), whole(c.expert_b), c.threshold, b.expert, b.row, b.column,
                db.expert, db.row, db.column, da.expert, da.row, da.column)
      .flag(count_b > 0)
      .flag(c.frozen)
      .constants(launch.block_r, launch.block_r, 1, launch.block_m, launch.block_n)
      .run({blocks, 1, 1}, options(launch));
}

// dA [members r, k] of members' partial sums [row splits, k, R].
void reduce_members(const Tensor& partials, const Tensor& dA, int64_t r, int64_t threshold, const Ranks& ranks,
                    const LowRankLaunch& launch) {
  const Tensor none;
  const int64_t k = partials.size(1);
  const Strides s(dA);
  Launch one(triton::kReduce, dA.device());
  one.pointers(none, none, none, none, none, none, none, partials, none, none, dA, none, none, none, none, none)
      .integers(0, partials.size(0), 0, k, r)
      .number(1.0)
      .integers(r, 0, 0, threshold, 0, 0, 0, 0, 0, 0, s.expert, s.row, s.column)
      .flag(false)
      .flag(false)
      .constants(ranks.R, ranks.each, ranks.members, launch.block_m, launch.block_n)
      .run({cdiv(k, launch.block_n), 1, 1}, options(launch));
}

// The kernels write all of a gradient except the other slots of a stack.
Tensor gradient_like(const Tensor& like) {
  return like.dim() == 3 ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
}

// S or dS [m, columns], dense. What is cut off or added is the zeros of ranks that are not there.
Tensor with_columns(const Tensor& S, int64_t columns) {
  return S.size(1) == columns ? S.contiguous() : at::constant_pad_nd(S, {0, columns - S.size(1)});
}

// dS [m, columns of S] of dSu or its planes.
Tensor grad_s(const Tensor& dSu, const LowRankTritonCall& c, const Tensor& S) {
  Tensor dS = dSu.dim() == 3 ? dSu.sum(0).to(c.B.scalar_type()) : dSu;
  if (c.u.defined()) dS = dS * at::constant_pad_nd(c.u, {0, dS.size(1) - c.u.size(0)});
  const Tensor& given = c.S.defined() ? c.S : S;
  return with_columns(dS, given.defined() ? given.size(1) : dS.size(1));
}

// The most ranks of a factor.
int64_t most_ranks(const std::vector<Tensor>& factors) {
  int64_t r = 0;
  for (const Tensor& A : factors) r = std::max(r, A.size(0));
  return r;
}

// Of members, of which each has r ranks at most: padded_rank of triton_kernels/tiles.py.
Ranks side_by_side(int64_t r, size_t members, const LowRankPlan& plan) {
  int64_t each = 16;
  while (each < r) each *= 2;
  return {plan.reduce.block_r, each, static_cast<int64_t>(members)};
}

// The rows of the factors [r_i, k] one below the other, r of each.
Tensor beside(const std::vector<Tensor>& factors, int64_t r) {
  std::vector<Tensor> rows;
  for (const Tensor& A : factors) {
    rows.push_back(A);
    if (A.size(0) != r) rows.push_back(at::zeros({r - A.size(0), A.size(1)}, A.options()));
  }
  return rows.size() == 1 ? rows[0] : at::cat(rows);
}

}  // namespace

std::pair<Tensor, Tensor> lowrank_triton_fwd(const LowRankTritonCall& c, const LowRankPlan& plan) {
  const int64_t m = c.x.size(0), n = c.B.size(-2), r = c.B.size(-1);
  const c10::DeviceGuard guard(c.x.device());
  const int64_t R = plan.reduce.block_r;
  const bool given = c.S.defined();
  const Tensor y = at::empty({m, n}, c.x.options()), S = given ? with_columns(c.S, R) : at::empty({m, R}, c.B.options());
  if (plan.single_kernel) {
    TORCH_INTERNAL_ASSERT(!given, "the single kernel makes S itself");
    linear(c, y, S, plan.linear);
    return {y, S};
  }
  const int64_t splits = plan.shrink.splits;
  const Tensor in = splits == 1 || given ? S : planes(m, R, S.options(), splits);
  if (!given)
    shrink(c.x, c.A, Strides(c.A), r, Tensor(), in, {Tensor(), 1.0}, c.rank, c.expert_a, c.threshold, c.seed,
           c.precision, plan.shrink, Ranks(in));
  Expansion e;
  e.u = c.u, e.v = c.v, e.bias = c.bias, e.scale = c.scale, e.expert = c.expert_b;
  if (!c.weight.defined()) e.add = c.add;
  if (!in.is_same(S)) e.S = S;
  expand(in, c.B, Strides(c.B), r, y, e, c.precision, plan.expand, Ranks(in));
  if (c.weight.defined()) y.addmm_(c.x, c.weight.t());
  return {y, S};
}

LowRankGrads lowrank_triton_bwd(const Tensor& dy, const LowRankTritonCall& c, const Tensor& S, const LowRankNeeds& needs,
                                const LowRankPlan& plan) {
  const int64_t m = dy.size(0), n = dy.size(1), r = c.B.size(-1), R = plan.reduce.block_r;
  const int64_t k = c.A.defined() ? c.A.size(-1) : c.x.defined() ? c.x.size(-1) : n;
  const c10::DeviceGuard guard(dy.device());
  LowRankGrads out;
  if (needs.A) out.A = gradient_like(c.A);
  if (needs.B) out.B = gradient_like(c.B);
  if (needs.u) out.u = gradient_like(c.u);
  if (needs.v) out.v = gradient_like(c.v);
  const bool of_base = needs.x && !c.A.defined(), to_x = needs.x && !of_base;  // of_base: alone, since S was given
  if (to_x) out.x = at::empty({m, k}, dy.options());
  if (needs.bias) out.bias = at::empty({n}, dy.options());

  Sums sums;
  Tensor dSu;
  const bool over_rows_b = needs.B || needs.v, need_dS = to_x || needs.A || needs.u || needs.S;
  const bool one_pass = plan.one_pass_b && need_dS && (over_rows_b || needs.bias);
  const int64_t row_blocks = one_pass ? cdiv(m, plan.grad_b.block_m) : RowSplits(m, plan.db).count;
  if (over_rows_b) sums.of_b = partial_sums(dy, {row_blocks, n, R});
  if (needs.bias && (one_pass || over_rows_b)) sums.of_bias = partial_sums(dy, {row_blocks, n});
  if (need_dS) {
    const LowRankLaunch& launch = one_pass ? plan.grad_b : plan.dsu;
    dSu = planes(m, R, c.B.options(), launch.splits);
    if (one_pass) {
      one_pass_b(dy, c, S, dSu, sums.of_b, sums.of_bias, launch);
    } else {
      shrink(dy, c.B, Strides(c.B).transposed(), r, dense(c.v), dSu, c.scale, c.rank, c.expert_b, 0, Tensor(),
             c.precision, launch, Ranks(dSu));
    }
  }
  if (needs.S) out.S = grad_s(dSu, c, S);
  if (over_rows_b && !one_pass) {
    OverRows o;
    o.partials = sums.of_b, o.sums = sums.of_bias;
    over_rows(dy, n, S, r, c.B.scalar_type(), o, c.precision, plan.db, Ranks(S));
  } else if (needs.bias && !sums.of_bias.defined()) {
    at::sum_out(out.bias, dy, 0);
  }

  const bool over_rows_a = needs.A || needs.u, fused = to_x && plan.fused_a && over_rows_a;
  if (to_x && !fused) {
    Expansion e;
    e.u = c.u, e.expert = c.expert_a, e.threshold = c.threshold, e.seed = c.seed;
    expand(dSu, c.A, Strides(c.A).transposed(), r, out.x, e, c.precision, plan.expand, Ranks(dSu));
  }
  if (over_rows_a) {
    const int64_t row_splits = RowSplits(m, plan.grad_a).count;
    if (needs.A) sums.of_a = partial_sums(dy, {row_splits, k, R});
    if (needs.u) sums.of_u = partial_sums(dy, {row_splits, R});
    OverRows o;
    o.A = c.A, o.S = S, o.u = dense(c.u), o.partials = sums.of_a, o.dots = sums.of_u;
    o.expert = c.expert_a, o.threshold = c.threshold, o.seed = c.seed;
    if (fused) o.dx = out.x;
    over_rows(c.x, k, dSu, r, c.B.scalar_type(), o, c.precision, plan.grad_a, Ranks(dSu));
  }
  reduce(c, n, k, sums, out, plan.reduce);
  if (of_base) out.x = dy.mm(c.weight);
  if (to_x && c.weight.defined()) out.x.addmm_(dy, c.weight);
  if (needs.weight) out.weight = dy.t().mm(c.x);
  return out;
}

std::vector<Tensor> shared_shrink_triton_fwd(const SharedShrinkTritonCall& c, const LowRankPlan& plan) {
  const int64_t m = c.x.size(0), r = most_ranks(c.factors), splits = plan.shrink.splits;
  const c10::DeviceGuard guard(c.x.device());
  const Ranks ranks = side_by_side(r, c.factors.size(), plan);
  const at::TensorOptions options = c.factors[0].options();
  Tensor S = splits == 1 || m == 0
                 ? at::empty({ranks.members, m, ranks.each}, options)
                 : at::empty({ranks.members, splits, m, ranks.each}, options.dtype(at::kFloat));
  if (m == 0) return S.unbind();
  const Tensor A = beside(c.factors, r);
  const Control all{Tensor(), static_cast<double>(r)};
  shrink(c.x, A, Strides(A), r, Tensor(), S, {Tensor(), 1.0}, all, {}, c.threshold, c.seeds, c.precision, plan.shrink,
         ranks);
  if (splits > 1) S = S.sum(1).to(options.dtype());
  return S.unbind();
}

SharedShrinkGrads shared_shrink_triton_bwd(const std::vector<Tensor>& grads, const Tensor& onto,
                                           const SharedShrinkTritonCall& c, bool need_x, const std::vector<bool>& needs,
                                           const LowRankPlan& plan) {
  SharedShrinkGrads out{Tensor(), std::vector<Tensor>(c.factors.size())};
  std::vector<size_t> kept;
  bool need_factors = false;
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].defined() || !(need_x || needs[i])) continue;
    kept.push_back(i);
    need_factors = need_factors || needs[i];
  }
  if (kept.empty()) {
    if (need_x) out.x = onto;
    return out;
  }
  const int64_t m = grads[kept[0]].size(0), k = c.factors[0].size(1), r = most_ranks(c.factors);
  const Ranks ranks = side_by_side(r, kept.size(), plan);
  const c10::DeviceGuard guard(grads[kept[0]].device());
  std::vector<Tensor> of_members, factors, seed_of;
  for (const size_t i : kept) {
    of_members.push_back(with_columns(grads[i], ranks.each));
    factors.push_back(c.factors[i]);
    if (c.threshold > 0 && kept.size() < c.factors.size()) seed_of.push_back(c.seeds[i]);
  }
  const Tensor dS = kept.size() > 1 ? at::stack(of_members) : of_members[0];
  const Tensor seeds = seed_of.empty() ? c.seeds : at::stack(seed_of);
  if (need_x) {
    const Tensor& like = onto.defined() ? onto : c.x.defined() ? c.x : c.factors[0];
    out.x = onto.defined() && onto.is_contiguous() ? onto : at::empty({m, k}, like.options());
    if (m > 0) {
      const Tensor A = beside(factors, r);
      Expansion e;
      e.add = onto, e.seed = seeds, e.threshold = c.threshold;
      expand(dS, A, Strides(A).transposed(), r, out.x, e, c.precision, plan.expand, ranks);
    }
  }
  if (!need_factors) return out;
  const at::TensorOptions options = c.factors[0].options();
  const Tensor dA = m > 0 ? at::empty({ranks.members * r, k}, options) : at::zeros({ranks.members * r, k}, options);
  if (m > 0) {
    OverRows o;
    o.partials = partial_sums(dS, {RowSplits(m, plan.grad_a).count, k, ranks.R});
    o.threshold = c.threshold, o.seed = seeds;
    over_rows(c.x, k, dS, r, dA.scalar_type(), o, c.precision, plan.grad_a, ranks);
    reduce_members(o.partials, dA, r, c.threshold, ranks, plan.reduce);
  }
  for (size_t j = 0; j < kept.size(); ++j) {
    const size_t i = kept[j];
    if (needs[i]) out.factors[i] = dA.narrow(0, static_cast<int64_t>(j) * r, c.factors[i].size(0));
  }
  return out;
}

}  // namespace peft_fused
