// For test_cuda_on_host.py: kernels that are right, and kernels that are wrong in one way each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void number(float*, float* out, int) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  out[i] = static_cast<float>(i);
}

// Each thread gives what the next one has, through shared memory; without a barrier there is a race.
__global__ void rotate(float* in, float* out, int barrier) {
  extern __shared__ float row[];
  __shared__ float first;
  const unsigned i = threadIdx.x;
  row[i] = in[i];
  if (i == 0) first = in[0];
  if (barrier) __syncthreads();
  out[i] = i + 1 < blockDim.x ? row[i + 1] : first;
}

__global__ void unwritten(float*, float* out, int) {
  extern __shared__ float row[];
  out[threadIdx.x] = row[threadIdx.x];
}

__global__ void uninitialised(float*, float* out, int) {
  volatile float v[4];
  out[threadIdx.x] = v[1];
}

// Blocks that write to one place.
__global__ void last_block(float*, float* out, int) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void past_shared(float*, float*, int past) {
  extern __shared__ float row[];
  row[threadIdx.x + past] = 1.f;
}

__global__ void sum(float* in, float* out, int missing) {
  if (static_cast<int>(threadIdx.x) == missing) return;
  float v = in[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  out[threadIdx.x] = v;
}

__global__ void reduce(float* in, float* out, int) {
  const unsigned v = static_cast<unsigned>(in[threadIdx.x]);
  out[threadIdx.x] = static_cast<float>(__reduce_max_sync(kAll, v) * 1000 + __reduce_add_sync(kAll, v));
}

// Half of a warp is in a collective, the other at a barrier or in another collective.
__global__ void diverged(float*, float*, int barrier) {
  if (threadIdx.x % 2) __reduce_max_sync(kAll, 1);
  else if (barrier) __syncthreads();
  else __reduce_add_sync(kAll, 1);
}

// A collective of the even lanes, without an offset called by the odd ones too. An odd offset leads to those.
__global__ void half_warp(float* in, float* out, int offset) {
  if (threadIdx.x % 2 && offset) return;
  out[threadIdx.x] = __shfl_xor_sync(0x55555555u, in[threadIdx.x], offset);
}

// Some threads leave before the barrier.
__global__ void leave(float* in, float* out, int) {
  if (threadIdx.x < 5) return;
  if (threadIdx.x == 5) in[0] = 7.f;
  __syncthreads();
  out[threadIdx.x] = in[0];
}

__global__ void read_at(float* in, float* out, int at) { out[threadIdx.x] = in[at]; }

struct alignas(16) Four {
  float v[4];
};
__global__ void read_four(float* in, float* out, int at) {
  const Four four = *reinterpret_cast<const Four*>(in + at);
  out[threadIdx.x] = four.v[3];
}

__global__ void overflow(float* in, float* out, int at) {
  out[threadIdx.x] = static_cast<float>(static_cast<unsigned>(in[at] * 1e9f));
}

// `count` floats to the nearest half or bf16, and back.
__global__ void to_half(float* in, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = __half2float(__float2half_rn(in[i]));
}
__global__ void to_bf16(float* in, float* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = __bfloat162float(__float2bfloat16_rn(in[i]));
}

const std::map<std::string, void (*)(float*, float*, int)> kKernels = {
#define PROBE(name) {#name, name}
    PROBE(number),      PROBE(rotate), PROBE(unwritten), PROBE(uninitialised), PROBE(last_block),
    PROBE(past_shared), PROBE(sum),    PROBE(reduce),    PROBE(diverged),      PROBE(half_warp),
    PROBE(leave),       PROBE(read_at), PROBE(read_four), PROBE(overflow),     PROBE(to_half), PROBE(to_bf16),
#undef PROBE
};

}  // namespace

PEFT_FUSED_ENTRY int opt_in(const char* name, int bytes) {
  return cudaFuncSetAttribute(kKernels.at(name), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

PEFT_FUSED_ENTRY int probe(const char* name, float* in, float* out, int x, int y, int z, int threads, int rows,
                           int shared, int argument) {
  const auto kernel = kKernels.at(name);
  kernel<<<dim3(x, y, z), dim3(threads, rows), shared, nullptr>>>(in, out, argument);
  return cudaGetLastError();
}
