// The kernels around butterfly.h: one block per pair of rows, or per split of the pairs. Types are read at run time,
// since they matter on the way in and out only; so there is one kernel for all lengths and types.
#include "fft.h"

#include <algorithm>

#include "butterfly.h"

namespace peft_fused {
namespace {

constexpr int kMaxThreads = kFftLongest / kFftPoints;
// Pairs that a block adds up one after the other: no more, so that the partial sum's rounding stays below the
// transforms'.
constexpr int64_t kMostPairs = 64;

template <typename F>
PEFT_FUSED_DEVICE void with_type(Type type, const F& f) {
  if (type == Type::f32) f(float{});
  else if (type == Type::f16) f(__half{});
  else f(__nv_bfloat16{});
}

PEFT_FUSED_DEVICE float value_of(const FloatControl& control) {
  return control.pointer ? *control.pointer : control.value;
}

__global__ void __launch_bounds__(kMaxThreads, 1) convolve_kernel(const FftConvolveParams p,
                                                                  const __grid_constant__ FftPlan plan) {
  extern __shared__ Complex row_buffer[];
  Team team;
  const FftTables tables{plan, static_cast<const Complex*>(p.twiddles), static_cast<const Complex*>(p.khat)};
  const Keep keep{p.seed, p.threshold, p.keep_scale};
  const int64_t row = 2 * static_cast<int64_t>(blockIdx.x);
  const auto load = [&](int column, PairBlock& block) {
    with_type(p.x_type, [&](auto tag) {
      using X = decltype(tag);
      load_pair(Matrix<const X>{static_cast<const X*>(p.x), p.m, p.n_in, p.x_row}, row, column, block);
    });
    if (!p.mask_output) keep_pair(keep, row, column, block);
  };
  const auto store = [&](int column, PairBlock& block) {
    if (p.mask_output) keep_pair(keep, row, column, block);
    with_type(p.y_type, [&](auto tag) {
      using Y = decltype(tag);
      store_pair(Matrix<Y>{static_cast<Y*>(p.y), p.m, p.n_out, p.y_row},
                 Matrix<const Y>{static_cast<const Y*>(p.add), p.m, p.n_out, p.add_row}, row, column, block);
    });
  };
  convolve_pair(team, tables, p.conjugate, value_of(p.scale), convolve_buffer(row_buffer, plan.length), load, store);
}

__global__ void __launch_bounds__(kMaxThreads, 1) correlate_kernel(const FftCorrelateParams p,
                                                                   const __grid_constant__ FftPlan plan,
                                                                   int64_t block_rows) {
  extern __shared__ Complex row_buffer[];
  Team team;
  const FftTables tables{plan, static_cast<const Complex*>(p.twiddles), static_cast<const Complex*>(p.khat)};
  const Keep keep{p.seed, p.threshold, p.keep_scale};
  const int64_t begin = min(blockIdx.x * block_rows, p.m), end = min(begin + block_rows, p.m);
  const auto load_x = [&](int64_t row, int column, PairBlock& block) {
    with_type(p.x_type, [&](auto tag) {
      using X = decltype(tag);
      load_pair(Matrix<const X>{static_cast<const X*>(p.x), p.m, p.n_in, p.x_row}, row, column, block);
    });
    keep_pair(keep, row, column, block);
  };
  const auto load_dy = [&](int64_t row, int column, PairBlock& block) {
    with_type(p.dy_type, [&](auto tag) {
      using Y = decltype(tag);
      load_pair(Matrix<const Y>{static_cast<const Y*>(p.dy), p.m, p.n_out, p.dy_row}, row, column, block);
    });
  };
  const auto store_dx = [&](int64_t row, int column, PairBlock& block) {
    keep_pair(keep, row, column, block);
    with_type(p.x_type, [&](auto tag) {
      using X = decltype(tag);
      store_pair(Matrix<X>{static_cast<X*>(p.dx), p.m, p.n_in, p.dx_row}, Matrix<const X>{}, row, column, block);
    });
  };
  correlate_rows(team, tables, p.conjugate, value_of(p.scale), p.dx != nullptr, begin, end,
                 correlate_buffers(row_buffer, plan.length),
                 static_cast<Complex*>(p.partial) + static_cast<int64_t>(blockIdx.x) * fft_half(plan.length), load_x,
                 load_dy, store_dx);
}

bool fits(int n_in, int n_out, int length, FftPlan* plan) {
  return fft_plan(length, plan) && std::max(n_in, n_out) <= length;
}

// Opts in to all that a block may have, not to what this call needs: the limit belongs to the kernel, and another
// thread may be launching it with a longer row.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int64_t blocks, int shared, const FftPlan& plan, cudaStream_t stream, Args... args) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), fft_threads(plan.length), shared, stream>>>(args...);
  return cudaGetLastError();
}

int64_t pairs_of(int64_t m) { return (m + 1) / 2; }

}  // namespace

cudaError_t fft_convolve(const FftConvolveParams& p, cudaStream_t stream) {
  FftPlan plan;
  if (!fits(p.n_in, p.n_out, p.length, &plan)) return cudaErrorInvalidValue;
  if (p.m == 0) return cudaSuccess;
  return launch(convolve_kernel, pairs_of(p.m), fft_convolve_shared(p.length), plan, stream, p, plan);
}

cudaError_t fft_correlate(const FftCorrelateParams& p, cudaStream_t stream) {
  FftPlan plan;
  if (!fits(p.n_in, p.n_out, p.length, &plan) || p.blocks < 1) return cudaErrorInvalidValue;
  return launch(correlate_kernel, p.blocks, fft_correlate_shared(p.length), plan, stream, p, plan,
                fft_block_rows(p.m, p.blocks));
}

cudaError_t fft_correlate_blocks(int64_t m, int length, int* blocks) {
  FftPlan plan;
  if (!fft_plan(length, &plan)) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // The registers that a full-sized block may take let an SM hold kMaxThreads threads, in blocks of any size.
  const int64_t resident = multiprocessors * static_cast<int64_t>(kMaxThreads / fft_threads(length));
  const int64_t pairs = std::max<int64_t>(pairs_of(m), 1);
  const int64_t per_block = std::min((pairs + resident - 1) / resident, kMostPairs);
  *blocks = static_cast<int>((pairs + per_block - 1) / per_block);
  return cudaSuccess;
}

}  // namespace peft_fused
