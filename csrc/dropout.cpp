#include "dropout.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include <bit>
#include <type_traits>
#include <vector>

#include "kernels/philox.h"
#include "memory.h"
#ifdef PEFT_FUSED_CUDA
#include "kernels/launch.h"
#endif

namespace peft_fused {
namespace {

// Blocks advanced together, so that the compiler keeps each Philox word of all of them in one vector register.
constexpr int kLanes = 16;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void row_bits(uint64_t seed, uint32_t row, int64_t blocks, uint16_t* bits) {
  for (int64_t first = 0; first < blocks; first += kLanes) {
    uint32_t w[4][kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const PhiloxBlock b = philox(seed, static_cast<uint32_t>(first + lane), row);
      w[0][lane] = b.w[0];
      w[1][lane] = b.w[1];
      w[2][lane] = b.w[2];
      w[3][lane] = b.w[3];
    }
    uint16_t* out = bits + first * kElementsPerBlock;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int word = 0; word < 4; ++word) {
        out[lane * 8 + word * 2] = static_cast<uint16_t>(w[word][lane]);
        out[lane * 8 + word * 2 + 1] = static_cast<uint16_t>(w[word][lane] >> 16);
      }
  }
}

// A conditional would become a branch per element, and an infinity times 0 is not 0: the mask is made of bits. x may be
// y, which the compiler is told to let be.
template <typename scalar_t>
void drop_row(const scalar_t* x, scalar_t* y, const uint16_t* bits, int64_t columns, at::opmath_type<scalar_t> scale,
              uint16_t threshold) {
  using wide = at::opmath_type<scalar_t>;
  using word = std::conditional_t<sizeof(scalar_t) == 2, uint16_t,
                                  std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>>;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t k = 0; k < columns; ++k) {
    const auto kept = static_cast<scalar_t>(static_cast<wide>(x[k]) * scale);
    const auto mask = static_cast<word>(-static_cast<word>(bits[k] >= threshold));
    y[k] = std::bit_cast<scalar_t>(static_cast<word>(std::bit_cast<word>(kept) & mask));
  }
}

// out = drop(in), both contiguous; they may be one tensor.
void drop_rows(const at::Tensor& in, const at::Tensor& out, const at::Tensor& seed, int64_t threshold,
               int64_t first_row) {
  const int64_t rows = in.size(0), columns = in.size(1);
  if (in.numel() == 0) return;
  const double scale = 65536.0 / (65536.0 - static_cast<double>(threshold));
#ifdef PEFT_FUSED_CUDA
  if (in.is_cuda()) {
    launch_drop(in, seed, out, threshold, first_row);
    return;
  }
#endif
  TORCH_CHECK(in.is_cpu(), "drop: the extension was built without CUDA kernels");
  const uint64_t key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const int64_t blocks = (columns + kElementsPerBlock - 1) / kElementsPerBlock;
  const int64_t padded = (blocks + kLanes - 1) / kLanes * kLanes * kElementsPerBlock;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, in.scalar_type(), "peft_fused_drop", [&] {
    const scalar_t* source = in.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / columns), [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> bits(padded);
      for (int64_t row = begin; row < end; ++row) {
        row_bits(key, static_cast<uint32_t>(first_row + row), blocks, bits.data());
        drop_row(source + row * columns, target + row * columns, bits.data(), columns, scale, threshold);
      }
    });
  });
}

}  // namespace

at::Tensor seed_of(const at::Tensor& seed, int64_t threshold, const at::Device& device) {
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 65535, "threshold must be in 0..65535, got ", threshold);
  const at::Tensor found = readable(seed, "seed");
  TORCH_CHECK_VALUE(found.dim() == 0 && found.scalar_type() == at::kLong && found.device() == device,
                    "seed must be a 0-d int64 tensor on ", device, ", got ", found.scalar_type(), " ", found.sizes(),
                    " on ", found.device());
  return found;
}

at::Tensor drop(const at::Tensor& x, const at::Tensor& seed_, int64_t threshold, int64_t first_row) {
  const at::Tensor in = readable(x, "x").contiguous(), seed = seed_of(seed_, threshold, in.device());
  TORCH_CHECK_VALUE(in.dim() == 2, "x must have shape [rows, columns], got ", in.sizes());
  TORCH_CHECK_TYPE(c10::isFloatingType(in.scalar_type()), "x must be floating point, got ", in.scalar_type());
  TORCH_CHECK_VALUE(first_row >= 0, "first_row must be at least 0, got ", first_row);
  at::Tensor out = at::empty_like(in);
  drop_rows(in, out, seed, threshold, first_row);
  return out;
}

at::Tensor drop_(const at::Tensor& own, const at::Tensor& seed, int64_t threshold, int64_t first_row) {
  TORCH_INTERNAL_ASSERT(own.is_contiguous());
  drop_rows(own, own, seed_of(seed, threshold, own.device()), threshold, first_row);
  return own;
}

}  // namespace peft_fused
