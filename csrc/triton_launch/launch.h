// Launches of kernels that Triton has compiled: of a call what triton.runtime.JITFunction.run does, without Python.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace peft_fused::triton {

// The kernels that are launched here, in the order of kKernelNames.
enum Kernel { kShrink, kExpand, kLinear, kGradB, kGradA, kReduce, kRows, kGrad, kBottleneckReduce, kKernels };
extern const char* const kKernelNames[kKernels];

// What Triton makes of a parameter's value, of which it compiles a kernel for each kind.
enum class Specialise : char {
  constant = 'c',   // compiled in
  all = 's',        // whether it is 1, whether 16 divides it, whether a pointer is aligned to 16 bytes
  nothing = 'v',    // its type alone
  unaligned = 'u',  // the same, for a pointer
};

// A compiled kernel: the driver's handle, threads of a block and bytes of its shared memory.
struct Compiled {
  void* function = nullptr;
  unsigned threads = 0, shared = 0;
};

// One argument, as the compiler has to know it. tag: 'N' no pointer, 'P' a pointer, 'A' an aligned one; '1' the integer
// 1, 'i' 32 bits, 'd' 32 bits and a multiple of 16, 'l' and 'm' the same of 64; 'f' a float; of what is compiled in 'b' a
// flag, 'c' an integer, 'w' a word of kWords, 't' a type.
struct Argument {
  char tag;
  at::ScalarType type;  // of a pointer, or 't'
  int64_t value;
};
constexpr const char* kWords[] = {"tf32x3", "tf32", "gelu", "gelu_tanh", "relu", "silu", "tanh", "identity"};

// How a kernel is compiled. maxnreg: 0 leaves it to the compiler.
struct Options {
  int64_t num_warps, num_stages, maxnreg;
};

// Compiles, by Python and Triton: called once for arguments of one kind, with the kernel's name.
using Compile =
    std::function<Compiled(const char* kernel, int device, at::ArrayRef<Argument> arguments, const Options& options)>;

// Tells how the parameters of each kernel are specialised, and who compiles. What is known is forgotten.
void configure(const std::vector<std::string>& specialised, Compile compile);

// Where launches go: to the driver, or, in tests and benchmarks of the host, to a list or nowhere.
enum class Destination { driver, list, nowhere };
void send_to(Destination destination);

struct Recorded {
  uint64_t function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  uint64_t stream;
  std::vector<std::string> arguments;  // bytes
  std::vector<at::Tensor> tensors;     // which they point to
};
// The launches of the list, which is empty then.
std::vector<Recorded> recorded();

// A launch on a device's current stream: the arguments in the kernel's order, then `run`.
class Launch {
 public:
  Launch(Kernel kernel, const at::Device& device) : kernel_(kernel), device_(device) {}
  Launch& pointer(const at::Tensor& t);  // none where undefined
  template <typename... Tensors>
  Launch& pointers(const Tensors&... tensors) {
    (pointer(tensors), ...);
    return *this;
  }
  Launch& integer(int64_t value);
  template <typename... Values>
  Launch& integers(Values... values) {
    (integer(values), ...);
    return *this;
  }
  Launch& number(double value);
  Launch& flag(bool value) { return constant('b', value); }
  Launch& constant(int64_t value) { return constant('c', value); }
  template <typename... Values>
  Launch& constants(Values... values) {
    (constant(static_cast<int64_t>(values)), ...);
    return *this;
  }
  Launch& word(int index) { return constant('w', index); }
  Launch& type(at::ScalarType type) { return constant('t', static_cast<int64_t>(type)); }
  void run(std::array<int64_t, 3> grid, const Options& options);

 private:
  static constexpr int kMost = 48;  // arguments
  Launch& constant(char tag, int64_t value);
  Specialise specialised() const;
  void add(char tag, at::ScalarType type, int64_t value);
  const Compiled& compiled(const Options& options) const;

  Kernel kernel_;
  at::Device device_;
  int count_ = 0;
  std::array<Argument, kMost> arguments_;
  std::vector<at::Tensor> kept_;  // by the list, so that no later tensor has their addresses
};

}  // namespace peft_fused::triton
