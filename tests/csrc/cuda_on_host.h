// Enough of CUDA to run csrc/kernels on the CPU, for tests: a fibre per thread of a block, blocks one after the other.
// cuda_on_host.py prepares and compiles the sources.
//
// A fibre runs until it has to wait, at a barrier or in a warp collective for other lanes. Which of those that can run
// goes first is set by set_order: a result that depends on it is a race. What a device would refuse, report or wait for
// in vain ends the launch with an error and a message. Fresh stacks and shared memory are filled with NaN, and shared
// memory ends at a page that cannot be accessed.
#pragma once
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __CUDACC__
#define __CUDA_ARCH__ 800
#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// One for all blocks, since there is one at a time. `extern __shared__ T name[];` is rewritten to a dynamic_shared.
#define __shared__ static

// What Python calls.
#define PEFT_FUSED_ENTRY extern "C" __attribute__((visibility("default")))

using std::min;

// ----------------------------------------------------------------------------------------------------- the runtime API

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
  float x, y;
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr int kMultiprocessors = 132;
constexpr int kSharedWithoutOptIn = 48 << 10;
constexpr int kSharedMost = 163 << 10;  // sm_80's, the least of the supported architectures
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10, kPoisoned = 8 << 10;  // bytes of a fibre, and those that are NaN when it starts

// Of threads, and of blocks where it is not random; from 2 on it is a seed, the order being drawn whenever all have had
// a turn.
enum Order { kForwards, kBackwards };
enum class State { fresh, ready, at_barrier, in_collective, done };
enum class Collective { shuffle_xor, reduce_max, reduce_add };

struct Thread {
  State state;
  int number;
  ucontext_t start;
  jmp_buf here;
  uint32_t posted, received;
  int offset;
};

struct Warp {
  uint32_t mask, arrived;
  Collective kind;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<size_t> sequence;
  unsigned char* stacks = nullptr;
  std::function<void()> body;
  Thread* current = nullptr;
  jmp_buf scheduler, abandoned;
  unsigned char* shared_end = nullptr;
  size_t shared = 0;
  std::map<void*, int> opted_in;
  int order = kForwards;
  std::mt19937 generator;
  cudaError_t error = cudaSuccess;
  char message[512] = "";
};
Machine machine;

// Leaves the launch, from a fibre or from between them.
template <typename... Args>
[[noreturn]] void fail(cudaError_t error, const char* format, Args... args) {
  machine.error = error;
  const int used = snprintf(machine.message, sizeof machine.message, "block (%u, %u, %u), ", blockIdx.x, blockIdx.y,
                            blockIdx.z);
  const int more = machine.current ? snprintf(machine.message + used, sizeof machine.message - used, "thread %d, ",
                                              machine.current->number)
                                   : 0;
  snprintf(machine.message + used + more, sizeof machine.message - used - more, format, args...);
  _longjmp(machine.abandoned, 1);
}

// Until resume() comes back to this fibre.
void wait(State state) {
  machine.current->state = state;
  if (_setjmp(machine.current->here) == 0) _longjmp(machine.scheduler, 1);
}

void resume(Thread& thread) {
  machine.current = &thread;
  const unsigned n = static_cast<unsigned>(thread.number);
  threadIdx = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
  if (_setjmp(machine.scheduler) == 0) {
    if (thread.state == State::fresh) setcontext(&thread.start);
    _longjmp(thread.here, 1);
  }
  machine.current = nullptr;
}

void fibre() {
  machine.body();
  wait(State::done);
}

uint32_t combine(Collective kind, const Thread* lanes, uint32_t mask, int lane) {
  if (kind == Collective::shuffle_xor) {
    const int partner = lane ^ lanes[lane].offset;
    if (partner > 31 || !(mask >> partner & 1))
      fail(cudaErrorLaunchFailure, "a shuffle reads a lane that takes no part");
    return lanes[partner].posted;
  }
  uint32_t most = 0, sum = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      most = std::max(most, lanes[i].posted);
      sum += lanes[i].posted;
    }
  return kind == Collective::reduce_max ? most : sum;
}

// What this lane gets when all lanes of the mask have posted theirs. One collective of a warp at a time.
uint32_t exchange(Collective kind, uint32_t mask, uint32_t value, int offset = 0) {
  Thread& self = *machine.current;
  const int first = self.number / 32 * 32, lane = self.number - first;
  Warp& warp = machine.warps[self.number / 32];
  if (!(mask >> lane & 1))
    fail(cudaErrorLaunchFailure, "the mask of a warp collective leaves out a lane that calls it");
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.mask = mask;
  } else if (warp.kind != kind || warp.mask != mask) {
    fail(cudaErrorLaunchFailure, "lanes of a warp meet in different collectives");
  }
  self.posted = value;
  self.offset = offset;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    wait(State::in_collective);
    return self.received;
  }
  Thread* const lanes = &machine.threads[first];
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) lanes[i].received = combine(kind, lanes, mask, i);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) lanes[i].state = State::ready;
  warp.arrived = 0;
  return self.received;
}

void start_fibres() {
  const size_t count = machine.threads.size();
  for (size_t i = 0; i < count; ++i) {
    unsigned char* const stack = machine.stacks + i * kStack;
    memset(stack + kStack - kPoisoned, 0xFF, kPoisoned);
    Thread& thread = machine.threads[i];
    thread.state = State::fresh;
    thread.number = static_cast<int>(i);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fibre, 0);
  }
}

// Nothing can run: either all that are left stand at the barrier, or some wait for a lane that will not come.
void pass_barrier() {
  for (const Thread& thread : machine.threads)
    if (thread.state == State::in_collective)
      fail(cudaErrorLaunchFailure, "lanes of warp %d wait in a collective that others never reach", thread.number / 32);
  for (Thread& thread : machine.threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
}

void run_block() {
  start_fibres();
  memset(machine.shared_end - kSharedMost, 0xFF, kSharedMost);
  std::fill(machine.warps.begin(), machine.warps.end(), Warp{});
  std::vector<size_t>& sequence = machine.sequence;
  sequence.resize(machine.threads.size());
  std::iota(sequence.begin(), sequence.end(), 0);
  if (machine.order == kBackwards) std::reverse(sequence.begin(), sequence.end());
  for (bool left = true; left;) {
    if (machine.order > kBackwards) std::shuffle(sequence.begin(), sequence.end(), machine.generator);
    bool ran = false;
    left = false;
    for (const size_t i : sequence) {
      Thread& thread = machine.threads[i];
      if (thread.state == State::fresh || thread.state == State::ready) {
        resume(thread);
        ran = true;
      }
      left |= thread.state != State::done;
    }
    if (left && !ran) pass_barrier();
  }
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGSEGV || signal == SIGBUS) fail(cudaErrorIllegalAddress, "no access to %p", info->si_addr);
  Dl_info library{};
  dladdr(info->si_addr, &library);
  const auto offset = static_cast<char*>(info->si_addr) - static_cast<char*>(library.dli_fbase);
  fail(cudaErrorLaunchFailure, "undefined behaviour, for instance a misaligned access: addr2line -ie %s %#tx",
       library.dli_fname, offset);
}

// The signals of bad accesses, and of what -fsanitize-undefined-trap-on-error traps.
class Signals {
 public:
  Signals() {
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < kCount; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kCount = 4;
  static constexpr int kSignals[kCount] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[kCount];
};

void run_grid() {
  const Signals signals;
  if (_setjmp(machine.abandoned) != 0) return;
  const uint64_t layer = uint64_t{gridDim.x} * gridDim.y, count = layer * gridDim.z;
  for (uint64_t turn = 0; turn < count; ++turn) {
    const uint64_t i = machine.order == kBackwards ? count - 1 - turn : turn;
    blockIdx = {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
                static_cast<unsigned>(i / layer)};
    run_block();
  }
}

unsigned char* map_pages(size_t bytes) {
  return static_cast<unsigned char*>(
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

void map_memory() {
  if (machine.stacks) return;
  machine.stacks = map_pages(kMaxThreads * kStack);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = (kSharedMost + page - 1) / page * page;
  machine.shared_end = map_pages(bytes + page) + bytes;
  mprotect(machine.shared_end, page, PROT_NONE);
}

bool refuse(cudaError_t error, const char* reason) {
  machine.error = error;
  snprintf(machine.message, sizeof machine.message, "%s", reason);
  return true;
}

bool refuse_launch(const dim3& grid, const dim3& block, size_t shared, void* kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, "bad number of threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "bad number of blocks");
  const auto opted_in = machine.opted_in.find(kernel);
  const int most = opted_in == machine.opted_in.end() ? kSharedWithoutOptIn : opted_in->second;
  return shared > static_cast<size_t>(most) && refuse(cudaErrorInvalidValue, "too much shared memory");
}

// kernel<<<grid, block, shared, stream>>>(a...) is rewritten to Launch(grid, block, shared, stream)(kernel, a...).
class Launch {
 public:
  Launch(const dim3& grid, const dim3& block, size_t shared, cudaStream_t)
      : grid_(grid), block_(block), shared_(shared) {}

  template <typename... Params, typename... Args>
  void operator()(void (*kernel)(Params...), const Args&... args) const {
    if (refuse_launch(grid_, block_, shared_, reinterpret_cast<void*>(kernel))) return;
    map_memory();
    gridDim = grid_;
    blockDim = block_;
    machine.shared = shared_;
    const size_t threads = size_t{block_.x} * block_.y * block_.z;
    machine.threads.resize(threads);
    machine.warps.resize((threads + 31) / 32);
    machine.body = [&] { kernel(args...); };
    run_grid();
  }

 private:
  dim3 grid_, block_;
  size_t shared_;
};

template <typename T>
T* dynamic_shared() {
  const size_t bytes = (machine.shared + alignof(T) - 1) / alignof(T) * alignof(T);
  return reinterpret_cast<T*>(machine.shared_end - bytes);
}

}  // namespace
}  // namespace cuda_on_host

static inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

static inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_host::kMultiprocessors : cuda_on_host::kSharedMost;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > cuda_on_host::kSharedMost) return cudaErrorInvalidValue;
  cuda_on_host::machine.opted_in[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

static inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::machine.error, cudaSuccess); }

PEFT_FUSED_ENTRY void set_order(int order) {
  cuda_on_host::machine.order = order;
  cuda_on_host::machine.generator.seed(static_cast<unsigned>(order));
}
// One of the defects that have been put into a source, or -1.
static int defect = -1;
PEFT_FUSED_ENTRY void set_defect(int number) { defect = number; }

// Of the last failure, once.
PEFT_FUSED_ENTRY const char* take_message() {
  static char taken[sizeof cuda_on_host::machine.message];
  memcpy(taken, cuda_on_host::machine.message, sizeof taken);
  cuda_on_host::machine.message[0] = 0;
  return taken;
}

// ---------------------------------------------------------------------------------------------------- device functions

static inline uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
static inline float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

static inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::State::at_barrier); }

static inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  return float_of(cuda_on_host::exchange(cuda_on_host::Collective::shuffle_xor, mask, float_bits(value), offset));
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return cuda_on_host::exchange(cuda_on_host::Collective::reduce_max, mask, value);
}
static inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return cuda_on_host::exchange(cuda_on_host::Collective::reduce_add, mask, value);
}

static inline unsigned atomicMax(unsigned* target, unsigned value) {
  return std::exchange(*target, std::max(*target, value));
}
static inline unsigned atomicAdd(unsigned* target, unsigned value) { return std::exchange(*target, *target + value); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
static inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

// ---------------------------------------------------------------------------------------------------------- half types

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 v) { return float_of(uint32_t{v.bits} << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = float_bits(v);
  if (v != v) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

static inline float __half2float(__half v) {
  const uint32_t sign = uint32_t{v.bits} >> 15 << 31, magnitude = v.bits & 0x7FFFu;
  if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | magnitude << 13);
  // Half's exponents start 112 below those of a float; the product takes denormals with it.
  return float_of(sign | float_bits(float_of(magnitude << 13) * 0x1p112f));
}
static inline __half __float2half_rn(float v) {
  if (v != v) return {0x7FFF};
  const uint32_t sign = float_bits(v) >> 16 & 0x8000, magnitude = float_bits(v) & 0x7FFFFFFF;
  uint32_t half = 0x7C00;
  if (magnitude < 0x38800000) half = float_bits(float_of(magnitude) + 0.5f) - float_bits(0.5f);  // denormal
  else if (magnitude < 0x47800000) half = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}
