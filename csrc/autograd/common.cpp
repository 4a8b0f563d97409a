#include "common.h"

#include <ATen/TracerMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../dropout.h"
#include "../memory.h"

namespace peft_fused {

using at::Tensor;

namespace {
constexpr int64_t kBlockElementsGpu = 1 << 24;  // enough to fill a GPU
}  // namespace

int64_t Dropout::threshold() const { return std::min<int64_t>(65535, std::llrint(p * 65536.0)); }

Tensor draw_seeds(at::IntArrayRef shape, const at::Device& device) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), shape, at::TensorOptions().dtype(at::kLong).device(device));
}

Tensor Dropout::seed_on(const at::Device& device) const {
  if (threshold() == 0) return Tensor();
  if (seed_tensor.defined()) return seed_of(seed_tensor, threshold(), device);
  return seed ? at::full({}, *seed, at::TensorOptions().dtype(at::kLong).device(device)) : draw_seeds({}, device);
}

Settings& settings() {
  static Settings settings;
  return settings;
}

bool plain(const Tensor& t) {
  return in_memory(t) && !t.is_quantized() && !lazy(t);
}

Key::Key(const Tensor& x) {
  usual_ = plain(x) && !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::tracer::impl::is_dispatch_enabled();
  const auto device = x.device().type();
  if (usual_ && at::autocast::is_autocast_enabled(device)) cast_ = at::autocast::get_autocast_dtype(device);
}

void autocast(const Tensor& x, at::ArrayRef<Tensor*> tensors, at::ArrayRef<Tensor*> parameters) {
  const auto device = x.device().type();
  const auto type = at::autocast::get_autocast_dtype(device);
  for (Tensor* t : tensors) *t = at::autocast::cached_cast(type, *t, device);
  for (Tensor* t : parameters)
    if (t->defined() && t->scalar_type() != at::kFloat) *t = at::autocast::cached_cast(type, *t, device);
}

void Key::add(const Tensor& t, bool parameter) {
  if (!t.defined()) return put('-');
  const auto type = t.scalar_type();
  const bool casts = cast_ && at::isFloatingType(type) && type != at::kDouble && !(parameter && type == at::kFloat);
  add_as(t, casts ? *cast_ : type);
}

void Key::add_as(const Tensor& t, at::ScalarType type) {
  usual_ = usual_ && plain(t);
  if (!usual_) return;
  const auto device = t.device();
  const std::array<int8_t, 4> kind{static_cast<int8_t>(type), static_cast<int8_t>(device.type()),
                                   static_cast<int8_t>(device.index()), static_cast<int8_t>(t.dim())};
  put(kind);
  put(t.sizes().data(), t.dim() * sizeof(int64_t));
}

void Key::add(double number) { put(number); }

void Key::add(const Dropout& dropout) {
  put(dropout.p);
  if (!dropout.seed_tensor.defined()) return put('-');
  add_as(dropout.seed_tensor, dropout.seed_tensor.scalar_type());
}

void Key::add(const std::string& word) {
  put(word.size());
  put(word.data(), word.size());
}

void Key::add(Control& control, bool present) {
  const Tensor& t = control.tensor;
  if (!present) return put('-');
  if (!t.defined()) {
    put('n');
    return put(control.number);
  }
  add_as(t, t.scalar_type());
  usual_ = usual_ && !t.requires_grad() && !t.is_complex();
  if (!usual_ || !t.is_cpu() || settings().cpu_is_device) return;
  if (t.dim() == 0) {
    control.number = t.item().toDouble();
    put(control.number);
    control.tensor = Tensor();
  } else if (t.numel() > 0 && c10::isIntegralType(t.scalar_type(), /*includeBool=*/false)) {
    // Of an index per group its range decides.
    const auto [least, most] = at::aminmax(t);
    put(least.item().toDouble());
    put(most.item().toDouble());
  }
}

bool finite(double number, at::ScalarType type) {
  const auto narrow = static_cast<float>(number);
  if (type == at::kHalf) return std::isfinite(static_cast<float>(c10::Half(narrow)));
  if (type == at::kBFloat16) return std::isfinite(static_cast<float>(c10::BFloat16(narrow)));
  return type == at::kDouble ? std::isfinite(number) : std::isfinite(narrow);
}

Tensor kept(bool keeps, const Tensor& t, const char* name) {
  if (!keeps || !t.defined()) return Tensor();
  TORCH_CHECK_VALUE(!t.is_inference(), name, " must not be an inference tensor where backward reads it: pass ", name,
                    ".clone(), made outside of inference mode");
  return t;
}

torch::autograd::variable_list saved_of(torch::autograd::AutogradContext* ctx, at::ArrayRef<const char*> names) {
  torch::autograd::variable_list saved;
  try {
    saved = ctx->get_saved_variables();  // checkpointing recomputes in here, with autograd on
  } catch (const c10::Error& error) {
    const std::string what = error.what_without_backtrace();
    if (what.find("modified by an inplace operation") == std::string::npos) throw;
    TORCH_CHECK(false, "peft_fused: a tensor that backward reads, an input or a parameter, was changed in place after the "
                       "forward pass. Of an input write h = h + y in place of h += y; of a parameter, run backward "
                       "before it is changed. autograd says: ", what);
  }
  for (size_t i = 0; i < names.size(); ++i)
    if (saved[i].defined()) check_memory(saved[i], names[i]);
  return saved;
}

Tensor upstream(const Tensor& dy, const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), "peft_fused: the ", op,
              " op has no second derivative; use_backend('reference') has one");
  return readable(dy, "the gradient of the output");
}

Tensor rows_of(const Tensor& t) {
  if (t.dim() == 2) return t;
  return t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
}

Tensor unflatten(const Tensor& y, const Tensor& x) {
  if (x.dim() == 2) return y;
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return at::_unsafe_view(y, shape);
}

Blocks::Blocks(const Tensor& x2, int64_t columns, bool blocked, int64_t cpu_elements)
    : rows(x2.size(0)), step(rows), count(1) {
  if (!blocked || rows == 0) return;
  step = std::max<int64_t>(1, (x2.is_cpu() ? cpu_elements : kBlockElementsGpu) / std::max<int64_t>(1, columns));
  count = (rows + step - 1) / step;
}

Tensor Blocks::of(const Tensor& t, int64_t i) const {
  return whole() || !t.defined() ? t : t.narrow(0, i * step, std::min(step, rows - i * step));
}

Tensor Blocks::cast_and_drop(const Tensor& x2, int64_t i, at::ScalarType type, int64_t threshold,
                             const Tensor& seed) const {
  const Tensor rows = of(x2, i), block = rows.to(type);
  if (threshold == 0) return block;
  // What the conversion has made is the block's own.
  return block.is_same(rows) || !block.is_contiguous() ? drop(block, seed, threshold, i * step)
                                                       : drop_(block, seed, threshold, i * step);
}

// Another layout of b than a dense one would run oneDNN's reference code, thousands of times slower.
bool uses_onednn(const Tensor& a, const Tensor& b) {
  const auto& s = settings();
  return s.onednn && a.is_cpu() && a.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn() &&
         a.numel() * b.size(1) >= s.onednn_least && (b.is_contiguous() || b.t().is_contiguous());
}

Tensor onednn_linear(const Tensor& x2, const Tensor& weight, const Tensor& bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                           c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  const Tensor dense = bias.defined() ? bias.contiguous() : bias;  // it reads the memory, whatever the stride
  return op.call(x2, weight, optional(dense), "none", c10::List<std::optional<at::Scalar>>(), "");
}

// oneDNN adds up in one chain where BLAS, on the CPUs that it serves, takes partial sums: for a product of the adapter
// it serves short sums only, which keeps the error BLAS has. The base product is worth more than that.
Tensor product(const Tensor& a, const Tensor& b, double alpha) {
  if (a.size(1) <= kMaxRank && uses_onednn(a, b)) {
    const bool scale_a = alpha != 1 && a.numel() < b.numel(), scale_b = alpha != 1 && !scale_a;
    return onednn_linear(scale_a ? a * alpha : a, (scale_b ? b * alpha : b).t(), Tensor());
  }
  if (alpha == 1) return a.mm(b);
  Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  return out.addmm_(a, b, /*beta=*/0, alpha);
}

// MKL on Intel's CPUs adds up 384 terms in one chain, with more error than an FFT, or a sum of short products, has.
Tensor split_k_product(const Tensor& a, const Tensor& b, int64_t terms) {
  if (a.scalar_type() != at::kFloat || !a.is_cpu()) return a.mm(b);
  constexpr int64_t kMostSplits = 32;  // of K: they are longer where there are more terms
  const int64_t k = a.size(1), splits = std::clamp<int64_t>((k + terms - 1) / terms, 1, kMostSplits);
  if (splits == 1) return product(a, b, 1);
  const int64_t step = (k + splits - 1) / splits;
  Tensor out = product(a.narrow(1, 0, step), b.narrow(0, 0, step), 1);
  for (int64_t i = step; i < k; i += step) {
    const int64_t n = std::min(step, k - i);
    out.addmm_(a.narrow(1, i, n), b.narrow(0, i, n));
  }
  return out;
}

void accumulate(Tensor& sum, const Tensor& part) { sum.defined() ? sum.add_(part) : sum = part; }

std::optional<Tensor> optional(const Tensor& t) { return t.defined() ? std::optional<Tensor>(t) : std::nullopt; }

}  // namespace peft_fused
