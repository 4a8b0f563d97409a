// Circulant, Toeplitz and Kronecker maps as one autograd node. The formulas are those of ops/structured/fft.py,
// ops/structured/materialized.py and ops/structured/gemm.py; here they are made of ATen calls without Python between
// them, and on CUDA convolutions are csrc/kernels/fft.cu.
#include "structured.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include <mutex>
#include <unordered_map>

#include "../dropout.h"
#include "../memory.h"
#ifdef PEFT_FUSED_CUDA
#include "../kernels/fft.h"
#include "../kernels/launch.h"
#endif

namespace peft_fused {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Everything backward needs that is no tensor to be differentiated.
struct StructuredCall : torch::CustomClassHolder {
  Structure structure;
  Method method;
  int64_t n, k, length, threshold;
  double scale;
  bool grad;  // whether autograd records the call
  std::string p_name, q_name;
  int q_edge, add_edge;  // positions among the node's inputs, -1 where absent
};

at::ScalarType wide(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// The type of the work: convolutions in fp32 at least, the Kronecker map's products in its factors' type.
at::ScalarType work_type(const StructuredCall& c, const Tensor& p) {
  return c.structure == Structure::kronecker ? p.scalar_type() : wide(p.scalar_type());
}

Tensor scaled(const Tensor& t, const StructuredCall& c, const Tensor& device_scale) {
  if (device_scale.defined()) return t * device_scale;
  return c.scale == 1 ? t : t * c.scale;
}

// ------------------------------------------------------------------------------------------- vectors and their gradient

// maps.kernel: the first column of the circulant matrix of order `length` that holds the map.
Tensor kernel_of(const StructuredCall& c, const Tensor& p, const Tensor& q) {
  Tensor column = p.to(wide(p.scalar_type())), before;
  if (c.structure == Structure::circulant) {
    if (q.defined()) column = column * q;
    if (c.length == column.size(0)) return column;
    before = column.narrow(0, 1, column.size(0) - 1);
  } else {
    before = q.to(column.scalar_type()).flip(0);
  }
  return at::cat({column, at::zeros({c.length - column.size(0) - before.size(0)}, column.options()), before});
}

// maps.fold: gradients of (p, q) from that of the kernel.
std::pair<Tensor, Tensor> fold(const StructuredCall& c, Tensor dk, const Tensor& p, const Tensor& q) {
  const int64_t length = dk.size(0);
  if (c.structure == Structure::toeplitz)
    return {dk.narrow(0, 0, p.size(0)), dk.narrow(0, length - q.size(0), q.size(0)).flip(0)};
  const int64_t n = p.size(0);
  if (length != n) {
    const Tensor before = dk.narrow(0, length - n + 1, n - 1);
    dk = dk.narrow(0, 0, n).clone();
    dk.narrow(0, 1, n - 1).add_(before);
  }
  if (!q.defined()) return {dk, Tensor()};
  return {dk * q, dk * p};
}

// maps.fold_dense: the gradient of the kernel of a linear convolution from that of the dense matrix.
Tensor diagonal_sums(const StructuredCall& c, const Tensor& gradient, const Tensor& p) {
  const int64_t rows = gradient.size(0), columns = gradient.size(1), width = rows + columns - 1;
  const Tensor slanted = at::cat({gradient.flip(1), at::zeros({rows, rows}, gradient.options())}, 1).flatten();
  const Tensor sums = slanted.narrow(0, 0, rows * width).view({rows, width}).sum(0);
  const int64_t length = c.structure == Structure::toeplitz ? width : 2 * p.size(0) - 1;
  Tensor dk = at::zeros({length}, sums.options());
  dk.narrow(0, 0, rows).copy_(sums.narrow(0, columns - 1, rows));
  dk.narrow(0, length - columns + 1, columns - 1).copy_(sums.narrow(0, 0, columns - 1));
  return dk;
}

// ---------------------------------------------------------------------------------------------------- transforms, CPU

// A call of torch's FFT costs tens of microseconds, so its blocks are larger.
constexpr int64_t kFftElementsCpu = 1 << 21;

Tensor transform(const Tensor& x, int64_t length) { return at::fft_rfft(x, length); }

// Terms of a sum that are added up in one chain: as ops/structured/materialized.py and gemm.py have them.
constexpr int64_t kDenseTerms = 256, kFactorTerms = 64;

constexpr int64_t kColumns = 128, kRows = 8;  // real numbers of a row, and rows, that are summed in fp32 first

// Adds conj(x) . y, summed over the rows, to s. x, y: [rows, stride] complex as interleaved real numbers, of which `width`
// from the first on count. re = x0 y0 + x1 y1 and im = x0 y1 - x1 y0 are kept apart until the end, elementwise.
template <typename real>
inline __attribute__((always_inline)) void correlate_columns(const real* x, const real* y, int64_t rows, int64_t stride,
                                                             int64_t width, double* s) {
  for (int64_t first = 0; first < rows; first += kRows) {
    real straight[kColumns] = {}, crossed[kColumns] = {};
    for (int64_t i = first; i < std::min(rows, first + kRows); ++i) {
      const real *a = x + i * stride, *b = y + i * stride;
      for (int64_t j = 0; j < width; ++j) straight[j] += a[j] * b[j];
      for (int64_t j = 0; j < width; j += 2) {
        crossed[j] += a[j] * b[j + 1];
        crossed[j + 1] += a[j + 1] * b[j];
      }
    }
    for (int64_t j = 0; j < width; j += 2) {
      s[j] += straight[j] + straight[j + 1];
      s[j + 1] += crossed[j] - crossed[j + 1];
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PEFT_FUSED_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PEFT_FUSED_CLONES
#endif
PEFT_FUSED_CLONES void correlate_columns_of(const float* x, const float* y, int64_t rows, int64_t stride, int64_t width,
                                            double* s) {
  correlate_columns(x, y, rows, stride, width, s);
}
PEFT_FUSED_CLONES void correlate_columns_of(const double* x, const double* y, int64_t rows, int64_t stride,
                                            int64_t width, double* s) {
  correlate_columns(x, y, rows, stride, width, s);
}

// Adds conj(X) . Y, summed over the rows, to `sum` (double, [F]). Sums of a few rows are added up in double: the result
// does not depend on the number of threads and is more exact than the transforms.
template <typename real>
void correlate_rows(const Tensor& X, const Tensor& Y, const Tensor& sum) {
  const int64_t m = X.size(0), stride = 2 * X.size(1);
  const real* x = static_cast<const real*>(X.const_data_ptr());
  const real* y = static_cast<const real*>(Y.const_data_ptr());
  double* s = static_cast<double*>(sum.mutable_data_ptr());
  at::parallel_for(0, (stride + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < std::min(stride, end * kColumns); first += kColumns)
      correlate_columns_of(x + first, y + first, m, stride, std::min(kColumns, stride - first), s + first);
  });
}

// y2 rows of block i = add + delta, in y's type. A delta that is the whole of y takes its place.
void store(const Blocks& blocks, int64_t i, const Tensor& delta, const Tensor& add2, Tensor& y2) {
  if (!add2.defined() && blocks.whole() && delta.is_contiguous() && delta.scalar_type() == y2.scalar_type()) {
    y2 = delta;
    return;
  }
  Tensor out = blocks.of(y2, i);
  if (!add2.defined()) {
    out.copy_(delta);
  } else if (add2.scalar_type() == delta.scalar_type()) {
    at::add_out(out, blocks.of(add2, i), delta);
  } else {
    out.copy_(delta + blocks.of(add2, i));
  }
}

// The first `width` columns of the circular convolution of the rows of x2, dropped out, with a spectrum.
void convolve_cpu(const StructuredCall& c, const Tensor& x2, const Tensor& spectrum, const Tensor& add2, Tensor& y2,
                  at::ScalarType type, const Tensor& seed) {
  const Blocks blocks(x2, c.length, true, kFftElementsCpu);
  for (int64_t i = 0; i < blocks.count; ++i) {
    Tensor X = transform(blocks.cast_and_drop(x2, i, type, c.threshold, seed), c.length);
    X.mul_(spectrum);
    store(blocks, i, at::fft_irfft(X, c.length).narrow(1, 0, y2.size(1)), add2, y2);
  }
}

// dx (if defined) and the gradient of the kernel (if x2 is defined), without the scale in the latter.
Tensor correlate_cpu(const StructuredCall& c, const Tensor& dy2, const Tensor& x2, const Tensor& spectrum, Tensor& dx,
                     at::ScalarType type, const Tensor& seed) {
  const bool need_dx = dx.defined();
  const Tensor back = need_dx ? spectrum.conj().resolve_conj() : Tensor();
  Tensor sum;
  if (x2.defined()) sum = at::zeros({c.length / 2 + 1}, dy2.options().dtype(at::kComplexDouble));
  const Blocks blocks(dy2, c.length, true, kFftElementsCpu);
  for (int64_t i = 0; i < blocks.count; ++i) {
    Tensor Y = transform(blocks.of(dy2, i).to(type), c.length);
    if (x2.defined()) {
      const Tensor X = transform(blocks.cast_and_drop(x2, i, type, c.threshold, seed), c.length);
      type == at::kDouble ? correlate_rows<double>(X, Y, sum) : correlate_rows<float>(X, Y, sum);
    }
    if (!need_dx) continue;
    Tensor block = at::fft_irfft(Y.mul_(back), c.length).narrow(1, 0, c.k);
    if (c.threshold > 0) block = drop_(block.contiguous(), seed, c.threshold, i * blocks.step);
    store(blocks, i, block, Tensor(), dx);
  }
  return sum.defined() ? at::fft_irfft(sum, c.length).to(type) : Tensor();
}

// --------------------------------------------------------------------------------------------------- transforms, CUDA

#ifdef PEFT_FUSED_CUDA
// The twiddles of a length; one table per length and device.
Tensor twiddles_of(int64_t length, const at::Device& device) {
  static std::mutex mutex;
  static std::unordered_map<int64_t, Tensor> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& table = tables[device.index() * (kFftLongest + 1) + length];
  if (!table.defined()) {
    const Tensor host = at::empty({length, 2}, at::kFloat);
    TORCH_CHECK(fft_twiddles(static_cast<int>(length), host.mutable_data_ptr<float>()), "no FFT of ", length);
    table = host.to(device);
  }
  return table;
}

FloatControl scale_of(const StructuredCall& c, const Tensor& device_scale) {
  return {device_scale.defined() ? device_scale.const_data_ptr<float>() : nullptr, static_cast<float>(c.scale)};
}

Tensor unit_columns(const Tensor& t) { return !t.defined() || t.stride(1) == 1 ? t : t.contiguous(); }

// y2 = add2 + scale * the convolution of x2, dropped out; transposed: dropout of the result, as dx is made.
void convolve_cuda(const StructuredCall& c, const Tensor& x2, const Tensor& kernel, const Tensor& add2, const Tensor& y2,
                   const Tensor& device_scale, const Tensor& seed, bool transposed) {
  const c10::DeviceGuard guard(x2.device());
  const Tensor x = unit_columns(x2), add = unit_columns(add2), khat = at::fft_fft(kernel);
  const Tensor twiddles = twiddles_of(c.length, x2.device());
  FftConvolveParams p{};
  p.x = x.const_data_ptr();
  p.add = add.defined() ? add.const_data_ptr() : nullptr;
  p.y = y2.mutable_data_ptr();
  p.khat = khat.const_data_ptr();
  p.twiddles = twiddles.const_data_ptr();
  p.seed = c.threshold > 0 ? seed.const_data_ptr<int64_t>() : nullptr;
  p.m = x.size(0);
  p.x_row = x.stride(0);
  p.add_row = add.defined() ? add.stride(0) : 0;
  p.y_row = y2.stride(0);
  p.n_in = static_cast<int>(x.size(1));
  p.n_out = static_cast<int>(y2.size(1));
  p.length = static_cast<int>(c.length);
  p.threshold = static_cast<uint32_t>(c.threshold);
  p.keep_scale = keep_scale(c.threshold);
  p.conjugate = p.mask_output = transposed;
  p.scale = scale_of(c, device_scale);
  p.x_type = type_of(x);
  p.y_type = type_of(y2);
  check_launch(fft_convolve(p, current_stream(x.device())), "fft_convolve");
}

// As correlate_cpu; a call without x is the transposed convolution alone.
Tensor correlate_cuda(const StructuredCall& c, const Tensor& dy2, const Tensor& x2, const Tensor& kernel, const Tensor& dx,
                      const Tensor& device_scale, const Tensor& seed) {
  if (!x2.defined()) {
    convolve_cuda(c, dy2, kernel, Tensor(), dx, device_scale, seed, /*transposed=*/true);
    return Tensor();
  }
  const c10::DeviceGuard guard(dy2.device());
  const Tensor dy = unit_columns(dy2), x = unit_columns(x2), khat = at::fft_fft(kernel);
  const Tensor twiddles = twiddles_of(c.length, dy.device());
  int blocks = 1;
  check_launch(fft_correlate_blocks(dy.size(0), static_cast<int>(c.length), &blocks), "fft_correlate");
  const Tensor partial =
      at::empty({blocks, fft_half(static_cast<int>(c.length))}, dy.options().dtype(at::kComplexFloat));
  FftCorrelateParams p{};
  p.x = x.const_data_ptr();
  p.dy = dy.const_data_ptr();
  p.dx = dx.defined() ? dx.mutable_data_ptr() : nullptr;
  p.partial = partial.mutable_data_ptr();
  p.khat = khat.const_data_ptr();
  p.twiddles = twiddles.const_data_ptr();
  p.seed = c.threshold > 0 ? seed.const_data_ptr<int64_t>() : nullptr;
  p.m = dy.size(0);
  p.x_row = x.stride(0);
  p.dy_row = dy.stride(0);
  p.dx_row = dx.defined() ? dx.stride(0) : 0;
  p.n_in = static_cast<int>(c.k);
  p.n_out = static_cast<int>(dy.size(1));
  p.length = static_cast<int>(c.length);
  p.blocks = blocks;
  p.threshold = static_cast<uint32_t>(c.threshold);
  p.keep_scale = keep_scale(c.threshold);
  p.scale = scale_of(c, device_scale);
  p.x_type = type_of(x);
  p.dy_type = type_of(dy);
  check_launch(fft_correlate(p, current_stream(dy.device())), "fft_correlate");
  return at::fft_irfft(partial.sum(0), c.length);
}
#endif

// --------------------------------------------------------------------------------------------------- the Kronecker map

// [m, a2 b2] -> [m, a1 b1]; the product that leaves less to the other one comes first. A and B come detached: at::matmul
// takes another order of operations for what requires a gradient.
Tensor kronecker_apply(const Tensor& x2, const Tensor& A, const Tensor& B) {
  const int64_t a1 = A.size(0), a2 = A.size(1), b1 = B.size(0), b2 = B.size(1), m = x2.size(0);
  if (b2 * a1 * (a2 + b1) <= b1 * a2 * (b2 + a1))
    return at::matmul(B, x2.reshape({m * b2, a2}).mm(A.t()).view({m, b2, a1})).view({m, b1 * a1});
  return at::matmul(B, x2.reshape({m, b2, a2})).view({m * b1, a2}).mm(A.t()).view({m, b1 * a1});
}

// -------------------------------------------------------------------------------------------------------------- node

// Tensors of a call that have no gradient; as plain arguments autograd would take them for inputs.
struct Extras {
  Tensor matrix, scale, seed;
};

struct Structured : torch::autograd::Function<Structured> {
  using Optional = std::optional<Tensor>;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& p, const Optional& q_,
                        const Optional& add_, const c10::intrusive_ptr<StructuredCall>& call, const Extras& extras) {
    const BelowAutograd guard;
    const StructuredCall& c = *call;
    const auto& [matrix, device_scale, seed] = extras;
    const Tensor q = q_.value_or(Tensor()), add2 = add_ ? rows_of(*add_) : Tensor(), x2 = rows_of(x);
    if (c.grad) {
      const auto needs = [&](const Tensor& t) { return t.defined() && t.requires_grad(); };
      const bool params = needs(p) || needs(q), any = params || needs(x);
      const char *p_name = c.p_name.c_str(), *q_name = c.q_name.c_str();
      ctx->save_for_backward({kept(params, x, "x"), kept(any, p, p_name), kept(any, q, q_name),
                              kept(needs(x), matrix, "matrix"), kept(any, device_scale, "scale"),
                              kept(any, seed, "seed")});
      ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    }

    const auto type = work_type(c, p);
    Tensor y;
    if (x2.size(0) == 0) {
      y = at::empty({0, c.n}, x2.options());
    } else if (c.method == Method::fft) {
      y = at::empty({x2.size(0), c.n}, x2.options());
      const Tensor kernel = kernel_of(c, p, q);
#ifdef PEFT_FUSED_CUDA
      if (x2.is_cuda()) {
        convolve_cuda(c, x2, kernel, add2, y, device_scale, seed, /*transposed=*/false);
        return unflatten(y, x);
      }
#endif
      convolve_cpu(c, x2, transform(scaled(kernel, c, device_scale), c.length), add2, y, type, seed);
    } else {
      const Tensor xd = Blocks(x2, 1, false).cast_and_drop(x2, 0, type, c.threshold, seed);
      // The dense matrix and half-precision factors stay as they are: scaled, they may leave the range of their type.
      const bool late = c.method == Method::dense || p.element_size() == 2;
      Tensor delta = c.method == Method::dense
                         ? split_k_product(xd, matrix.t(), kDenseTerms)
                         : kronecker_apply(xd, (late ? p : scaled(p, c, device_scale)).detach(), q.detach());
      if (late) delta = scaled(delta, c, device_scale);
      if (add2.defined()) delta.add_(add2);
      y = delta.to(x2.scalar_type());
    }
    return unflatten(y, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    // One gradient per argument of forward; what is no tensor, or absent, gets none.
    variable_list out(6);
    if (!grads[0].defined()) return out;
    const Tensor dy = upstream(grads[0], "structured");
    const auto call = call_of<StructuredCall>(ctx);
    const StructuredCall& c = *call;
    const auto saved = saved_of(ctx, {"x", c.p_name.c_str(), c.q_name.c_str(), "matrix", "scale", "seed"});
    const BelowAutograd guard;
    const Tensor &x = saved[0], &p = saved[1], &q = saved[2], &matrix = saved[3], &scale = saved[4], &seed = saved[5];
    const bool need_x = ctx->needs_input_grad(0), need_p = ctx->needs_input_grad(1);
    const bool need_q = c.q_edge >= 0 && ctx->needs_input_grad(c.q_edge), params = need_p || need_q;
    if (c.add_edge >= 0 && ctx->needs_input_grad(c.add_edge)) out[3] = dy;
    if (!need_x && !params) return out;

    const Tensor dy2 = rows_of(dy), x2 = params ? rows_of(x) : Tensor();
    Tensor dx, dp, dq;
    if (dy2.size(0) == 0) {
      dx = at::zeros({0, c.k}, dy2.options());
      dp = at::zeros_like(p);
      if (q.defined()) dq = at::zeros_like(q);
    } else if (c.method == Method::gemm) {
      std::tie(dx, dp, dq) = kronecker_backward(c, dy2, x2, p, q, scale, seed, need_x, need_p, need_q);
    } else {
      Tensor dk;
      if (c.method == Method::fft) {
        if (need_x) dx = at::empty({dy2.size(0), c.k}, dy2.options());
        dk = correlate(c, dy2, x2, kernel_of(c, p, q), dx, work_type(c, p), scale, seed);
      } else {
        const Tensor gd = scaled(dy2.to(work_type(c, p)), c, scale);
        if (need_x) dx = drop_back(c, split_k_product(gd, matrix, kDenseTerms), seed).to(dy2.scalar_type());
        if (params) {
          const Tensor xd = Blocks(x2, 1, false).cast_and_drop(x2, 0, gd.scalar_type(), c.threshold, seed);
          dk = diagonal_sums(c, split_k_product(gd.t(), xd, kDenseTerms), p);
        }
      }
      if (params) std::tie(dp, dq) = fold(c, dk, p.to(dk.scalar_type()), q.defined() ? q.to(dk.scalar_type()) : q);
    }
    if (need_x) {
      auto shape = dy.sizes().vec();
      shape.back() = c.k;
      out[0] = dx.view(shape);
    }
    if (need_p) out[1] = dp.to(p.scalar_type()).contiguous();
    if (need_q) out[2] = dq.to(q.scalar_type()).contiguous();
    return out;
  }

 private:
  static Tensor drop_back(const StructuredCall& c, const Tensor& dx, const Tensor& seed) {
    return c.threshold > 0 ? drop_(dx.contiguous(), seed, c.threshold, 0) : dx;
  }

  // Fills dx if it is defined and returns the gradient of the kernel if x2 is.
  static Tensor correlate(const StructuredCall& c, const Tensor& dy2, const Tensor& x2, const Tensor& kernel, Tensor& dx,
                          at::ScalarType type, const Tensor& device_scale, const Tensor& seed) {
    Tensor dk;
#ifdef PEFT_FUSED_CUDA
    if (dy2.is_cuda()) {
      dk = correlate_cuda(c, dy2, x2, kernel, dx, device_scale, seed);
      return dk.defined() ? scaled(dk, c, device_scale) : dk;
    }
#endif
    dk = correlate_cpu(c, dy2, x2, transform(scaled(kernel, c, device_scale), c.length), dx, type, seed);
    return dk.defined() ? scaled(dk, c, device_scale) : dk;
  }

  static std::tuple<Tensor, Tensor, Tensor> kronecker_backward(const StructuredCall& c, const Tensor& dy2, const Tensor& x2,
                                                               const Tensor& p, const Tensor& q, const Tensor& scale,
                                                               const Tensor& seed, bool need_x, bool need_A,
                                                               bool need_B) {
    const Tensor A = p.detach(), B = q.detach();
    const int64_t a1 = A.size(0), a2 = A.size(1), b1 = B.size(0), b2 = B.size(1), m = dy2.size(0);
    const auto type = A.scalar_type();
    const Tensor Y = scaled(dy2.to(type), c, scale).reshape({m * b1, a1});
    Tensor dx, dA, dB, E, x3;
    if (need_x || need_B) E = Y.mm(A).view({m, b1, a2});
    if (need_x) dx = drop_back(c, at::matmul(B.t(), E).view({m, b2 * a2}), seed).to(dy2.scalar_type());
    if (need_A || need_B) x3 = Blocks(x2, 1, false).cast_and_drop(x2, 0, type, c.threshold, seed).reshape({m, b2, a2});
    if (need_B)
      dB = split_k_product(E.transpose(0, 1).reshape({b1, m * a2}),
                           x3.transpose(0, 1).reshape({b2, m * a2}).t(), kFactorTerms);
    if (need_A) dA = split_k_product(Y.t(), at::matmul(B, x3).view({m * b1, a2}), kFactorTerms);
    return {dx, dA, dB};
  }
};

// ValueError, naming the argument, for what Python would not have decided to run here: nothing may read past a tensor.
void check_sizes(const StructuredArguments& a, const StructuredPath& path) {
  const char *p_name = path.p_name.c_str(), *q_name = path.q_name.c_str();
  check_memory(a.x, "x");
  check_memory(a.p, p_name);
  if (a.q.defined()) check_memory(a.q, q_name);
  if (a.add.defined()) check_memory(a.add, "add");
  TORCH_CHECK_VALUE(a.x.dim() >= 1, "x must have shape [..., K], got ", a.x.sizes());
  const bool kronecker = path.structure == Structure::kronecker;
  TORCH_CHECK_VALUE(kronecker == (path.method == Method::gemm),
                    "method must be gemm for a Kronecker map and for no other");
  for (const auto& [name, t] : {std::pair(p_name, a.p), std::pair(q_name, a.q)})
    TORCH_CHECK_VALUE(!t.defined() || (t.dim() == (kronecker ? 2 : 1) && t.device() == a.x.device()), name,
                      " must have ", kronecker ? 2 : 1, " dimensions and x's device, got ", t.sizes(), " on ", t.device());
  TORCH_CHECK_VALUE(a.q.defined() || path.structure == Structure::circulant, q_name, " must be a tensor, got none");
  TORCH_CHECK_VALUE(!a.add.defined() || a.add.dim() == a.x.dim(), "add must have shape [..., N], got ", a.add.sizes());
  if (path.method == Method::dense) {
    TORCH_CHECK_VALUE(path.matrix.defined() && path.matrix.dim() == 2, "matrix must be the dense matrix [N, K]");
    check_memory(path.matrix, "matrix");
  }
  TORCH_CHECK_VALUE(a.dropout.p >= 0 && a.dropout.p < 1, "dropout_p must be in [0, 1), got ", a.dropout.p);
}

}  // namespace

Key key_of(StructuredArguments& a) {
  Key key(a.x);
  key.add(a.kind);
  for (const Tensor* t : {&a.x, &a.p, &a.q, &a.add}) key.add(*t);
  key.add(static_cast<double>(a.out_features));
  key.add(a.scale);
  key.add(a.dropout);
  key.add(static_cast<double>(a.transposed));
  return key;
}

Tensor structured(const StructuredArguments& a, const StructuredPath& path) {
  check_sizes(a, path);
  auto call = c10::make_intrusive<StructuredCall>();
  call->structure = path.structure;
  call->method = path.method;
  call->n = path.n;
  call->k = a.x.size(-1);
  call->length = path.length;
  call->threshold = a.dropout.threshold();
  call->grad = at::GradMode::is_enabled();
  call->p_name = path.p_name;
  call->q_name = path.q_name;
  Tensor device_scale;
  if (a.scale.tensor.defined()) device_scale = a.scale.tensor.to(at::kFloat);
  call->scale = device_scale.defined() ? 1 : a.scale.number;
  int edges = 2;
  call->q_edge = a.q.defined() ? edges++ : -1;
  call->add_edge = a.add.defined() ? edges++ : -1;
  return Structured::apply(a.x, a.p, optional(a.q), optional(a.add), call,
                           Extras{path.matrix, device_scale, a.dropout.seed_on(a.x.device())});
}

}  // namespace peft_fused
