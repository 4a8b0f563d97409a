#include "launch.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>

namespace peft_fused::triton {

using at::Tensor;

const char* const kKernelNames[kKernels] = {
    "lowrank_kernels.shrink_kernel", "lowrank_kernels.expand_kernel",  "lowrank_kernels.linear_kernel",
    "lowrank_kernels.grad_b_kernel", "lowrank_kernels.grad_a_kernel",  "lowrank_kernels.reduce_kernel",
    "bottleneck_kernels.rows_kernel", "bottleneck_kernels.grad_kernel", "bottleneck_kernels.reduce_kernel"};

namespace {

// --------------------------------------------------------------------------------------------------------- the driver

// libcuda as far as it is needed, found when it is first launched on: this library is built and loaded without it.
struct Cuda {
  using Result = int;
  Result (*get_context)(void**) = nullptr;
  Result (*get_device)(int*, int) = nullptr;
  Result (*retain_context)(void**, int) = nullptr;
  Result (*set_context)(void*) = nullptr;
  Result (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                   void* stream, void** arguments, void** extra) = nullptr;
  Result (*error_name)(Result, const char**) = nullptr;

  Cuda() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    TORCH_CHECK(library != nullptr, "peft_fused: libcuda.so.1 does not load: ", dlerror());
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      TORCH_CHECK(function != nullptr, "peft_fused: libcuda.so.1 has no ", name);
    };
    find(get_context, "cuCtxGetCurrent");
    find(get_device, "cuDeviceGet");
    find(retain_context, "cuDevicePrimaryCtxRetain");
    find(set_context, "cuCtxSetCurrent");
    find(launch, "cuLaunchKernel");
    find(error_name, "cuGetErrorName");
  }

  void check(Result result, const char* what) const {
    if (result == 0) return;
    const char* name = nullptr;
    error_name(result, &name);
    TORCH_CHECK(false, "peft_fused: ", what, ": ", name != nullptr ? name : "unknown error");
  }

  // A thread that has not used a device yet has no context, which torch and the runtime make as they need it.
  void ensure_context(int device) const {
    void* context = nullptr;
    check(get_context(&context), "cuCtxGetCurrent");
    if (context != nullptr) return;
    int handle = 0;
    check(get_device(&handle, device), "cuDeviceGet");
    check(retain_context(&context, handle), "cuDevicePrimaryCtxRetain");
    check(set_context(context), "cuCtxSetCurrent");
  }

  static const Cuda& get() {
    static const Cuda cuda;
    return cuda;
  }
};

// ---------------------------------------------------------------------------------------------------------- the table

struct Hash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

struct Table {
  std::shared_mutex mutex;  // a launch reads, a compilation writes
  std::unordered_map<std::string, Compiled, Hash, std::equal_to<>> compiled;
  std::vector<std::string> specialised{kKernels};
  Compile compile;
  Destination destination = Destination::driver;
  std::mutex list_mutex;
  std::vector<Recorded> list;
};

// Never freed: autograd's threads may outlive static objects.
Table& table() {
  static Table* const found = new Table;
  return *found;
}

size_t bytes_of(char tag) { return tag == 'i' || tag == 'd' || tag == 'f' ? 4 : 8; }
bool is_passed(char tag) { return std::strchr("PAidlmf", tag) != nullptr; }

}  // namespace

void configure(const std::vector<std::string>& specialised, Compile compile) {
  TORCH_CHECK(specialised.size() == kKernels, "configure: one text for each kernel");
  const std::unique_lock lock(table().mutex);
  table().specialised = specialised;
  table().compile = std::move(compile);
  table().compiled.clear();
}

void send_to(Destination destination) { table().destination = destination; }

std::vector<Recorded> recorded() {
  const std::lock_guard lock(table().list_mutex);
  return std::exchange(table().list, {});
}

// ---------------------------------------------------------------------------------------------------------- a launch

Specialise Launch::specialised() const {
  const std::string& all = table().specialised[kernel_];
  TORCH_INTERNAL_ASSERT(count_ < static_cast<int>(all.size()), kKernelNames[kernel_], " takes fewer arguments");
  return static_cast<Specialise>(all[count_]);
}

void Launch::add(char tag, at::ScalarType type, int64_t value) {
  TORCH_INTERNAL_ASSERT(count_ < kMost);
  arguments_[count_++] = {tag, type, value};
}

Launch& Launch::pointer(const Tensor& t) {
  if (!t.defined()) {
    add('N', at::ScalarType::Undefined, 0);
    return *this;
  }
  if (table().destination == Destination::list) kept_.push_back(t);
  const auto address = reinterpret_cast<int64_t>(t.const_data_ptr());
  const bool aligned = specialised() == Specialise::all && address % 16 == 0;
  add(aligned ? 'A' : 'P', t.scalar_type(), address);
  return *this;
}

Launch& Launch::integer(int64_t value) {
  const bool all = specialised() == Specialise::all, wide = value != static_cast<int32_t>(value);
  const char tag = all && value == 1 ? '1' : all && value % 16 == 0 ? (wide ? 'm' : 'd') : (wide ? 'l' : 'i');
  add(tag, at::ScalarType::Undefined, value);
  return *this;
}

Launch& Launch::number(double value) {
  const auto narrow = static_cast<float>(value);
  int64_t bits = 0;
  std::memcpy(&bits, &narrow, sizeof(narrow));
  add('f', at::ScalarType::Undefined, bits);
  return *this;
}

Launch& Launch::constant(char tag, int64_t value) {
  TORCH_INTERNAL_ASSERT(specialised() == Specialise::constant, kKernelNames[kernel_], ", argument ", count_);
  add(tag, at::ScalarType::Undefined, value);
  return *this;
}

const Compiled& Launch::compiled(const Options& options) const {
  // The bytes that tell one kind of call from another: of each argument its tag, and its type or what is compiled in.
  char key[kMost * 9 + 16];
  size_t size = 0;
  const auto put = [&](const auto& value) {
    std::memcpy(key + size, &value, sizeof(value));
    size += sizeof(value);
  };
  put(static_cast<char>(kernel_));
  put(static_cast<int16_t>(device_.index()));
  for (const int64_t option : {options.num_warps, options.num_stages, options.maxnreg}) put(static_cast<int16_t>(option));
  for (int i = 0; i < count_; ++i) {
    const auto& a = arguments_[i];
    put(a.tag);
    if (a.type != at::ScalarType::Undefined) put(static_cast<char>(a.type));
    if (std::strchr("bcwt", a.tag) != nullptr) put(static_cast<int32_t>(a.value));
  }
  const std::string_view known(key, size);
  {
    const std::shared_lock lock(table().mutex);
    const auto found = table().compiled.find(known);
    if (found != table().compiled.end()) return found->second;
  }
  TORCH_CHECK(table().compile, "peft_fused: nobody compiles kernels");
  TORCH_INTERNAL_ASSERT(count_ == static_cast<int>(table().specialised[kernel_].size()), kKernelNames[kernel_]);
  const auto made =
      table().compile(kKernelNames[kernel_], device_.index(), {arguments_.data(), static_cast<size_t>(count_)}, options);
  const std::unique_lock lock(table().mutex);
  return table().compiled.emplace(std::string(known), made).first->second;  // which stays where it is
}

void Launch::run(std::array<int64_t, 3> grid, const Options& options) {
  const Compiled& kernel = compiled(options);
  // Triton's kernels end with two pointers to scratch memory, which these do not use.
  void* passed[kMost + 2];
  int64_t none = 0;
  int count = 0;
  for (int i = 0; i < count_; ++i)
    if (is_passed(arguments_[i].tag)) passed[count++] = &arguments_[i].value;
  passed[count] = passed[count + 1] = &none;
  void* stream = nullptr;
  if (!device_.is_cpu())
    stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  TORCH_CHECK(grid[0] < (int64_t{1} << 31) && grid[1] < 65536 && grid[2] < 65536, kKernelNames[kernel_],
              " would need a grid of ", grid[0], " x ", grid[1], " x ", grid[2]);
  const auto side = [&](int i) { return static_cast<unsigned>(grid[i]); };
  switch (table().destination) {
    case Destination::driver: {
      const Cuda& cuda = Cuda::get();
      cuda.ensure_context(device_.index());
      cuda.check(cuda.launch(kernel.function, side(0), side(1), side(2), kernel.threads, 1, 1, kernel.shared, stream,
                             passed, nullptr),
                 kKernelNames[kernel_]);
      break;
    }
    case Destination::list: {
      Recorded one{reinterpret_cast<uint64_t>(kernel.function), {side(0), side(1), side(2)}, kernel.threads,
                   kernel.shared, reinterpret_cast<uint64_t>(stream), {}, kept_};
      for (int i = 0; i < count_; ++i)
        if (is_passed(arguments_[i].tag))
          one.arguments.emplace_back(reinterpret_cast<const char*>(&arguments_[i].value), bytes_of(arguments_[i].tag));
      const std::lock_guard lock(table().list_mutex);
      table().list.push_back(std::move(one));
      break;
    }
    case Destination::nowhere:
      break;
  }
}

}  // namespace peft_fused::triton
