// Shrink: one warp per kProducts / R rows of x, lanes along K with 16-byte loads; the products of those rows with R rows of A
// stay in registers and are summed across the warp once at the end, in a fixed order. A comes from the caches; sharing
// each of its elements among several rows keeps that traffic below the one that counts, reading x once. Philox runs once
// per 8 elements of x whatever the rank.
#include "lowrank.h"
#include "rows.h"

namespace peft_fused {
namespace {

constexpr int kWarps = 4;
constexpr int kProducts = 32;  // sums held by a thread: enough reuse of x and A, few enough registers
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename X, typename F, int R>
__global__ void __launch_bounds__(kWarps * 32, 1) shrink_kernel(const ShrinkParams p) {
  constexpr int kRows = kProducts / R;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRows;
  const int lane = threadIdx.x % 32;
  const int first = blockIdx.y * R;
  if (row >= p.m) return;
  // A rank in device memory has been checked by nobody.
  const int64_t rank = min(p.rank.pointer ? *p.rank.pointer : p.rank.value, static_cast<int64_t>(p.r));
  const int64_t expert = p.expert.pointer ? *p.expert.pointer : p.expert.value;
  const int live = static_cast<int>(min(static_cast<int64_t>(R), rank - first));

  const X* x = static_cast<const X*>(p.x) + row * p.x_row;
  const F* A = static_cast<const F*>(p.A) + expert * p.a_expert + first * p.a_row;
  const bool x_aligned = vector_aligned(x) && p.x_row * sizeof(X) % 16 == 0;
  const bool a_aligned = vector_aligned(A) && p.a_row * sizeof(F) % 16 == 0;
  const uint64_t seed = p.seed ? static_cast<uint64_t>(*p.seed) : 0;

  float sum[kRows][R];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) sum[i][j] = 0.f;
  for (int64_t column = lane * kVector; live > 0 && column < p.k; column += 32 * kVector) {
    float xv[kRows][kVector];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      load_row(x + i * p.x_row, column, row + i < p.m ? p.k : 0, x_aligned, xv[i]);
      if (p.seed) apply_keep(xv[i], seed, column, row + i, p.threshold, p.keep_scale);
    }
#pragma unroll
    for (int j = 0; j < R; ++j)
      if (j < live) {
        float av[kVector];
        load_row(A + j * p.a_row, column, p.k, a_aligned, av);
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum[i][j] = fmaf(xv[i][e], av[e], sum[i][j]);
      }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < R; ++j) {
      float total = sum[i][j];
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
      if (lane == 0 && row + i < p.m && first + j < p.r)
        static_cast<F*>(p.S)[(row + i) * p.r + first + j] = narrow<F>(total);
    }
}

template <typename X>
__global__ void drop_kernel(const X* x, X* out, const int64_t* seed, int64_t rows, int64_t columns, int64_t first_row,
                            uint32_t threshold, float keep_scale) {
  const int64_t per_row = (columns + kVector - 1) / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= rows * per_row) return;
  const int64_t row = index / per_row, column = index % per_row * kVector;
  const X* source = x + row * columns;
  float v[kVector];
  load_row(source, column, columns, vector_aligned(source), v);
  apply_keep(v, static_cast<uint64_t>(*seed), column, first_row + row, threshold, keep_scale);
  X* target = out + row * columns + column;
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (column + j < columns) target[j] = narrow<X>(v[j]);
}

template <typename X, typename F, int R>
cudaError_t launch_shrink(const ShrinkParams& p, cudaStream_t stream) {
  constexpr int rows = kWarps * kProducts / R;
  const dim3 grid(static_cast<unsigned>((p.m + rows - 1) / rows), (p.r + R - 1) / R);
  shrink_kernel<X, F, R><<<grid, kWarps * 32, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename X, typename F>
cudaError_t shrink_of(const ShrinkParams& p, cudaStream_t stream) {
  // A rank above 16 takes several passes over x through L2; past that a matrix-unit kernel (Triton) is the better one.
  return p.r <= 8 ? launch_shrink<X, F, 8>(p, stream) : launch_shrink<X, F, 16>(p, stream);
}

}  // namespace

cudaError_t shrink(const ShrinkParams& p, cudaStream_t stream) {
  if (p.m == 0) return cudaSuccess;
  if (p.x_type == Type::f32) return shrink_of<float, float>(p, stream);
  if (p.x_type == Type::f16)
    return p.a_type == Type::f32 ? shrink_of<__half, float>(p, stream) : shrink_of<__half, __half>(p, stream);
  return p.a_type == Type::f32 ? shrink_of<__nv_bfloat16, float>(p, stream)
                               : shrink_of<__nv_bfloat16, __nv_bfloat16>(p, stream);
}

cudaError_t drop(const void* x, void* out, const int64_t* seed, int64_t rows, int64_t columns, int64_t first_row,
                 uint32_t threshold, float keep_scale, Type type, cudaStream_t stream) {
  const int64_t threads = rows * ((columns + kVector - 1) / kVector);
  if (threads == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>((threads + 255) / 256);
  const auto run = [&](auto tag) {
    using X = decltype(tag);
    drop_kernel<X><<<grid, 256, 0, stream>>>(static_cast<const X*>(x), static_cast<X*>(out), seed, rows, columns,
                                             first_row, threshold, keep_scale);
    return cudaGetLastError();
  };
  return type == Type::f32 ? run(float{}) : type == Type::f16 ? run(__half{}) : run(__nv_bfloat16{});
}

}  // namespace peft_fused
