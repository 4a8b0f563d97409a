#include "fft_host.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "dropout.h"
#include "kernels/butterfly.h"
#include "memory.h"

namespace peft_fused {
namespace {

FftPlan plan_of(int64_t length) {
  FftPlan plan;
  TORCH_CHECK_VALUE(length <= kFftLongest && fft_plan(static_cast<int>(length), &plan),
                    "length must be 5-smooth, at least 1 and at most ", kFftLongest, ", got ", length);
  return plan;
}

// Tensors are checked as they are: their pointers must not be those of a copy that has gone.
void check_plain(const at::Tensor& t, const char* name) {
  check_memory(t, name);
  TORCH_CHECK_VALUE(!lazy(t), name, " must have no negative or conjugate bit");
}

const Complex* table_of(const at::Tensor& table, int64_t length) {
  check_plain(table, "khat or twiddles");
  TORCH_CHECK_VALUE(table.is_cpu() && table.scalar_type() == at::kComplexFloat && table.is_contiguous() &&
                        table.dim() == 1 && table.size(0) == length,
                    "khat and twiddles must be contiguous complex64 CPU tensors of one length");
  return static_cast<const Complex*>(table.const_data_ptr());
}

Matrix<const float> rows_of(const at::Tensor& t, int64_t rows, int64_t length) {
  check_plain(t, "x, dy or add");
  TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == at::kFloat && t.dim() == 2 && t.stride(1) == 1 &&
                        t.size(0) == rows && t.size(1) <= length,
                    "x, dy and add must be fp32 CPU matrices of ", rows, " rows and at most ", length, " columns");
  return {t.const_data_ptr<float>(), rows, t.size(1), t.stride(0)};
}

Matrix<float> result_of(at::Tensor& t) { return {t.mutable_data_ptr<float>(), t.size(0), t.size(1), t.stride(0)}; }

Keep keep_of(const FftHostOptions& options) {
  if (options.seed) {
    check_plain(*options.seed, "seed");
    seed_of(*options.seed, options.threshold, at::kCPU);
  }
  return {options.seed ? options.seed->const_data_ptr<int64_t>() : nullptr, static_cast<uint32_t>(options.threshold),
          static_cast<float>(65536.0 / (65536.0 - static_cast<double>(options.threshold)))};
}

}  // namespace

std::vector<int> fft_radices(int64_t length) {
  const FftPlan plan = plan_of(length);
  std::vector<int> radices(plan.count);
  for (int i = 0; i < plan.count; ++i) radices[i] = plan.passes[i].radix;
  return radices;
}

at::Tensor fft_twiddles(int64_t length) {
  plan_of(length);
  at::Tensor table = at::empty({length}, at::kComplexFloat);
  fft_twiddles(static_cast<int>(length), static_cast<float*>(table.mutable_data_ptr()));
  return table;
}

at::Tensor fft_convolve_host(const at::Tensor& x, const at::Tensor& khat, const at::Tensor& twiddles, int64_t n_out,
                             const std::optional<at::Tensor>& add, bool mask_output, const FftHostOptions& options) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be a matrix, got ", x.sizes());
  const int64_t m = x.size(0);
  const FftPlan plan = plan_of(khat.numel());
  const FftTables tables{plan, table_of(twiddles, plan.length), table_of(khat, plan.length)};
  TORCH_CHECK_VALUE(n_out >= 0 && n_out <= plan.length, "n_out must be at most ", plan.length, ", got ", n_out);
  at::Tensor y = at::empty({m, n_out}, at::kFloat);
  const Matrix<const float> in = rows_of(x, m, plan.length);
  const Matrix<const float> base = add ? rows_of(*add, m, plan.length) : Matrix<const float>{};
  const Matrix<float> out = result_of(y);
  const Keep keep = keep_of(options);
  std::vector<Complex> shared(fft_convolve_shared(plan.length) / sizeof(Complex));
  Team team(fft_threads(plan.length), options.backwards);
  for (int64_t row = 0; row < m; row += 2) {
    const auto load = [&](int column, PairBlock& block) {
      load_pair(in, row, column, block);
      if (!mask_output) keep_pair(keep, row, column, block);
    };
    const auto store = [&](int column, PairBlock& block) {
      if (mask_output) keep_pair(keep, row, column, block);
      store_pair(out, base, row, column, block);
    };
    convolve_pair(team, tables, options.conjugate, static_cast<float>(options.scale),
                  convolve_buffer(shared.data(), plan.length), load, store);
  }
  return y;
}

std::tuple<at::Tensor, at::Tensor> fft_correlate_host(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& khat,
                                                      const at::Tensor& twiddles, int64_t blocks,
                                                      const FftHostOptions& options) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be a matrix, got ", x.sizes());
  const int64_t m = x.size(0);
  const FftPlan plan = plan_of(khat.numel());
  const FftTables tables{plan, table_of(twiddles, plan.length), table_of(khat, plan.length)};
  TORCH_CHECK_VALUE(blocks >= 1, "blocks must be at least 1, got ", blocks);
  at::Tensor dx = at::empty({m, x.size(1)}, at::kFloat);
  at::Tensor partial = at::empty({blocks, fft_half(plan.length)}, at::kComplexFloat);
  const Matrix<const float> in = rows_of(x, m, plan.length), upstream = rows_of(dy, m, plan.length);
  const Matrix<float> out = result_of(dx);
  const Keep keep = keep_of(options);
  std::vector<Complex> shared(fft_correlate_shared(plan.length) / sizeof(Complex));
  Team team(fft_threads(plan.length), options.backwards);
  const int64_t stripe = fft_stripe(m, blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    const auto load_x = [&](int64_t row, int column, PairBlock& pair) {
      load_pair(in, row, column, pair);
      keep_pair(keep, row, column, pair);
    };
    const auto load_dy = [&](int64_t row, int column, PairBlock& pair) { load_pair(upstream, row, column, pair); };
    const auto store_dx = [&](int64_t row, int column, PairBlock& pair) {
      keep_pair(keep, row, column, pair);
      store_pair(out, Matrix<const float>{}, row, column, pair);
    };
    correlate_rows(team, tables, options.conjugate, static_cast<float>(options.scale), true,
                   std::min(block * stripe, m), std::min((block + 1) * stripe, m),
                   correlate_buffers(shared.data(), plan.length),
                   static_cast<Complex*>(partial.mutable_data_ptr()) + block * fft_half(plan.length), load_x, load_dy,
                   store_dx);
  }
  return {dx, partial};
}

}  // namespace peft_fused
