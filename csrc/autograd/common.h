// What the autograd nodes share: which tensors they take, work on blocks of rows, and the choice of a matrix product.
#pragma once
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>

namespace peft_fused {

// A runtime value of an op: a number, or a 0-d tensor.
struct Control {
  at::Tensor tensor;
  double number = 0;
};

// Dropout as a caller gives it: a probability in [0, 1), and a seed, which is drawn where none is given.
struct Dropout {
  double p = 0;
  std::optional<int64_t> seed;
  at::Tensor seed_tensor;

  int64_t threshold() const;
  // 0-d int64 on the device; undefined without dropout.
  at::Tensor seed_on(const at::Device& device) const;
};

// Seeds from torch's generator of the device, one after the other: int64 of this shape.
at::Tensor draw_seeds(at::IntArrayRef shape, const at::Device& device);

// What Python's dispatch knows about this machine and tells once.
struct Settings {
  bool onednn = false;       // fp32 base products go to oneDNN
  int64_t onednn_least = 0;  // from this many multiply-adds on
  bool cpu_is_device = false;  // while launches do not go to a driver: controls on the CPU then stay tensors
};
Settings& settings();

constexpr int64_t kMaxRank = 256;
// Below this size the two layouts of the product for dB, or dU, cost the same and the direct one saves a transposition.
constexpr int64_t kSmallProduct = 1 << 16;

// An ordinary dense tensor: no subclass, and its memory holds its values as they are (see memory.h).
bool plain(const at::Tensor& t);

// All of a call that its checks and the choice of its path depend on, in bytes: calls of one key are checked and decided
// once, by ops/operation.py. A call that cannot be told by its key is unusual: something of it is no plain tensor, a
// number is none, a graph is traced, or a dispatch mode, such as selective checkpointing or fake tensors, has to see one
// operation where a node would show it pieces. Under autocast the key is that of what autocast makes of the call.
class Key {
 public:
  // Begins the key of a call on x.
  explicit Key(const at::Tensor& x);
  // An input of the op, undefined where absent; a parameter in fp32 stays that under autocast.
  void add(const at::Tensor& t, bool parameter = false);
  // Whether autocast is on where x is.
  bool cast() const { return cast_.has_value(); }
  // A control on the CPU is read; one on a device stays there.
  void add(Control& control, bool present = true);
  void add(double number);
  void add(const Dropout& dropout);
  void add(const std::string& word);
  void unusual() { usual_ = false; }
  bool usual() const { return usual_; }
  const char* data() const { return bytes_.data(); }
  size_t size() const { return size_; }

 private:
  // Unusual, too, is what has no room: tensors of dozens of dimensions.
  void put(const void* data, size_t size) {
    usual_ = usual_ && size_ + size <= bytes_.size();
    if (!usual_) return;
    std::memcpy(bytes_.data() + size_, data, size);
    size_ += size;
  }
  template <typename T>
  void put(T value) { put(&value, sizeof(T)); }

  void add_as(const at::Tensor& t, at::ScalarType type);

  std::optional<at::ScalarType> cast_;
  std::array<char, 1024> bytes_;
  size_t size_ = 0;
  bool usual_ = true;
};

// Makes of tensors what autocast makes of them where x is, differentiably, and of parameters, which stay in fp32; see
// `taken_dtype` of ops/operation.py. Undefined ones stay so.
void autocast(const at::Tensor& x, at::ArrayRef<at::Tensor*> tensors, at::ArrayRef<at::Tensor*> parameters);

// Whether a number is finite once rounded to this type: ATen refuses others as the alpha of tensors of it.
bool finite(double number, at::ScalarType type);

// What a node keeps of an argument for backward. ValueError, naming it, for an inference tensor.
at::Tensor kept(bool keeps, const at::Tensor& t, const char* name);

// What a node's forward saved, by these names. ValueError where the memory of one was freed since.
torch::autograd::variable_list saved_of(torch::autograd::AutogradContext* ctx, at::ArrayRef<const char*> names);

// The gradient that backward of an op's node starts from. RuntimeError where that would have to be differentiated.
at::Tensor upstream(const at::Tensor& dy, const char* op);

// What a node's forward left of its call, as a capsule.
template <typename Call>
c10::intrusive_ptr<Call> call_of(torch::autograd::AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
}

// A node differentiates as a whole: its pieces skip autograd's dispatch, and autocast, which may surround backward.
struct BelowAutograd {
  const at::AutoDispatchBelowADInplaceOrView autograd;
  const c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// [..., K] -> [M, K]
at::Tensor rows_of(const at::Tensor& t);

// y [M, N] in the leading dimensions of x. No view: an output of a node may be written in place later.
at::Tensor unflatten(const at::Tensor& y, const at::Tensor& x);

// Rows are worked on in blocks where something is made of them that is not to exist as a whole: x converted or dropped
// out, a spectrum.
struct Blocks {
  // Elements of a block on a CPU: few enough for its caches, enough to split over its cores.
  static constexpr int64_t kElementsCpu = 1 << 19;

  int64_t rows, step, count;

  Blocks(const at::Tensor& x2, int64_t columns, bool blocked, int64_t cpu_elements = kElementsCpu);
  bool whole() const { return count == 1; }
  at::Tensor of(const at::Tensor& t, int64_t i) const;
  // Row block i of x2, converted and, with a threshold, dropped out.
  at::Tensor cast_and_drop(const at::Tensor& x2, int64_t i, at::ScalarType type, int64_t threshold,
                           const at::Tensor& seed) const;
};

// Whether a b, with b [k, n], goes to oneDNN.
bool uses_onednn(const at::Tensor& a, const at::Tensor& b);

// x2 weight^T + bias by oneDNN.
at::Tensor onednn_linear(const at::Tensor& x2, const at::Tensor& weight, const at::Tensor& bias);

// alpha * a b, a product of the adapter.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, double alpha);

// a b. In fp32 on a CPU K is split evenly, into splits of `terms` at most unless those were too many; elsewhere not.
at::Tensor split_k_product(const at::Tensor& a, const at::Tensor& b, int64_t terms);

// sum += part, begun by the first part.
void accumulate(at::Tensor& sum, const at::Tensor& part);

// Autograd takes an absent tensor as an empty optional, not as an undefined tensor.
std::optional<at::Tensor> optional(const at::Tensor& t);

}  // namespace peft_fused
