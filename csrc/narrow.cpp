#include "narrow.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PEFT_FUSED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

namespace peft_fused::narrow {
namespace {

using at::Tensor;

constexpr int64_t kLanes = 16, kRows = 12;  // a tile of sums: all of it in registers
constexpr int64_t kTerms = 32;              // of a sum in one chain, which keeps the error that a library's product has
constexpr int64_t kColumns = 48;            // of a block whose rows are added up
constexpr int64_t kMostRanks = 64;
constexpr int64_t kGrain = 1 << 18;  // multiply-adds that are worth a thread
constexpr int64_t kSmallFactor = 1 << 12;  // elements of a factor that are worth packing for less than a tile of rows

#ifdef PEFT_FUSED_CLONES

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

// out(i, :) += sum over k of x(i, k) p(k, :), for kRows rows of kLanes.
PEFT_FUSED_CLONES void add_tile(const float* x, int64_t row, int64_t step, const float* p, int64_t p_step,
                                int64_t count, float* out, int64_t out_row) {
  Lanes a0{}, a1{}, a2{}, a3{}, a4{}, a5{}, a6{}, a7{}, a8{}, a9{}, a10{}, a11{};
  for (int64_t k = 0; k < count; ++k) {
    const Lanes v = *reinterpret_cast<const Lanes*>(p + k * p_step);
    const float* at = x + k * step;
    a0 += v * at[0], a1 += v * at[row], a2 += v * at[2 * row], a3 += v * at[3 * row];
    a4 += v * at[4 * row], a5 += v * at[5 * row], a6 += v * at[6 * row], a7 += v * at[7 * row];
    a8 += v * at[8 * row], a9 += v * at[9 * row], a10 += v * at[10 * row], a11 += v * at[11 * row];
  }
  const Lanes sums[kRows] = {a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11};
  for (int64_t i = 0; i < kRows; ++i) *reinterpret_cast<Lanes*>(out + i * out_row) += sums[i];
}

// A block of bf16 in fp32: rows are too short to be worth a call each.
PEFT_FUSED_CLONES void widen(const uint16_t* in, int64_t in_row, int64_t rows, int64_t columns, float* out,
                             int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      out[i * out_row + j] = std::bit_cast<float>(static_cast<uint32_t>(in[i * in_row + j]) << 16);
}

// To nearest, ties to even; a NaN stays one.
PEFT_FUSED_CLONES void round(const float* in, int64_t in_row, int64_t rows, int64_t columns, uint16_t* out,
                             int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const auto bits = std::bit_cast<uint32_t>(in[i * in_row + j]);
      const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
      out[i * out_row + j] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? (bits >> 16) | 0x40 : rounded);
    }
}

// values += factor * sums + start, of rows `row` apart.
PEFT_FUSED_CLONES void finish(float* values, const float* sums, const float* start, float factor, int64_t rows,
                              int64_t columns, int64_t row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) values[i * row + j] += factor * sums[i * row + j] + start[j];
}

// out [rows, columns] dense, of a matrix with any strides; by squares, of which a cache line of either side is used up.
PEFT_FUSED_CLONES void pack(const float* in, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out,
                            int64_t out_row) {
  for (int64_t i0 = 0; i0 < rows; i0 += kLanes)
    for (int64_t j0 = 0; j0 < columns; j0 += kLanes) {
      const int64_t i1 = i0 + kLanes < rows ? i0 + kLanes : rows, j1 = j0 + kLanes < columns ? j0 + kLanes : columns;
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) out[i * out_row + j] = in[i * row + j * column];
    }
}

bool fast_cpu() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
}

#else

bool fast_cpu() { return false; }
void add_tile(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t) {}
void widen(const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t) {}
void round(const float*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {}
void finish(float*, const float*, const float*, float, int64_t, int64_t, int64_t) {}
void pack(const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t) {}

#endif

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A matrix in fp32 whose rows are dense and have whole lanes: itself, or a copy.
struct Packed {
  const float* data;
  int64_t row;
  std::vector<float> copy;

  explicit Packed(const Tensor& t) : data(t.const_data_ptr<float>()), row(t.stride(0)) {
    const int64_t rows = t.size(0), columns = t.size(1);
    if (t.stride(1) == 1 && columns % kLanes == 0) return;
    const int64_t step = t.stride(0);
    row = padded(columns);
    copy.resize(rows * row);
    pack(data, step, t.stride(1), rows, columns, copy.data(), row);
    data = copy.data();
  }
};

bool dense_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; }

// Rows of fp32 or bf16 whose elements are dense.
struct Rows {
  Tensor t;
  bool half;
  int64_t step;

  explicit Rows(const Tensor& given)
      : t(dense_rows(given) ? given : given.contiguous()), half(t.scalar_type() == at::kBFloat16), step(t.stride(0)) {}
  // Rows [row, row + rows) of columns [column, column + columns), out_row elements apart.
  void read(int64_t row, int64_t rows, int64_t column, int64_t columns, float* out, int64_t out_row) const {
    const int64_t at = row * step + column;
    if (half) {
      widen(static_cast<const uint16_t*>(t.const_data_ptr()) + at, step, rows, columns, out, out_row);
      return;
    }
    const float* from = static_cast<const float*>(t.const_data_ptr()) + at;
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * step, columns, out + i * out_row);
  }
  void write(int64_t row, int64_t rows, int64_t column, int64_t columns, const float* in, int64_t in_row) const {
    const int64_t at = row * step + column;
    if (half) {
      round(in, in_row, rows, columns, static_cast<uint16_t*>(t.mutable_data_ptr()) + at, step);
      return;
    }
    float* to = static_cast<float*>(t.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < rows; ++i) std::copy_n(in + i * in_row, columns, to + i * step);
  }
};

int64_t grain(int64_t multiply_adds) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiply_adds)); }

}  // namespace

bool serves(const Tensor& x, at::ScalarType adapter, int64_t ranks) {
  return x.is_cpu() && adapter == at::kFloat && ranks <= kMostRanks && x.numel() > 0 && fast_cpu() &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
         (x.size(0) >= kRows || x.size(1) * padded(ranks) <= kSmallFactor);
}

Tensor times(const Tensor& x, const Tensor& p, double alpha) {
  const int64_t m = x.size(0), k = x.size(1), r = p.size(1), lanes = padded(r);
  const Rows rows(x);
  const Packed packed(p);
  const Tensor out = at::empty({m, r}, p.options());
  float* const to = out.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(alpha);
  at::parallel_for(0, (m + kRows - 1) / kRows, grain(kRows * k * lanes), [&](int64_t begin, int64_t end) {
    std::vector<float> terms(kRows * kTerms), sums(kRows * lanes);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kRows, count = std::min(kRows, m - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t at = 0; at < k; at += kTerms) {
        const int64_t width = std::min(kTerms, k - at);
        const float* from = terms.data();
        int64_t step = kTerms;
        if (!rows.half && count == kRows) {
          from = rows.t.const_data_ptr<float>() + first * rows.step + at, step = rows.step;
        } else {
          rows.read(first, count, at, width, terms.data(), kTerms);
        }
        for (int64_t lane = 0; lane < lanes; lane += kLanes)
          add_tile(from, step, 1, packed.data + at * packed.row + lane, packed.row, width, sums.data() + lane, lanes);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < r; ++j) to[(first + i) * r + j] = factor * sums[i * lanes + j];
    }
  });
  return out;
}

Tensor over_rows(const Tensor& s, const Tensor& x, double alpha) {
  const int64_t m = x.size(0), k = x.size(1), r = s.size(1), lanes = padded(r);
  const Rows rows(x);
  const Packed packed(s);
  const Tensor out = at::empty({r, k}, s.options());
  float* const to = out.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(alpha);
  at::parallel_for(0, (k + kColumns - 1) / kColumns, grain(kColumns * m * lanes), [&](int64_t begin, int64_t end) {
    std::vector<float> terms(kTerms * kColumns), sums(kColumns * lanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, width = std::min(kColumns, k - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t at = 0; at < m; at += kTerms) {
        const int64_t count = std::min(kTerms, m - at);
        rows.read(at, count, first, width, terms.data(), kColumns);
        for (int64_t column = 0; column < width; column += kRows)
          for (int64_t lane = 0; lane < lanes; lane += kLanes)
            add_tile(terms.data() + column, 1, kColumns, packed.data + at * packed.row + lane, packed.row, count,
                     sums.data() + column * lanes + lane, lanes);
      }
      for (int64_t j = 0; j < r; ++j)
        for (int64_t i = 0; i < width; ++i) to[j * k + first + i] = factor * sums[i * lanes + j];
    }
  });
  return out;
}

void add_product(const Tensor& y, const Tensor& onto, const Tensor& bias, const Tensor& s, const Tensor& q,
                 double alpha) {
  constexpr int64_t kWidth = 4 * kLanes;
  const int64_t m = y.size(0), n = y.size(1), r = s.size(1);
  const Packed packed(q);
  const Tensor factors = s.contiguous();
  const float* const from = factors.const_data_ptr<float>();
  TORCH_INTERNAL_ASSERT(dense_rows(y));  // another would be written to a copy
  const Rows out(y), before(onto.defined() ? onto : y);
  std::vector<float> start(n, 0.0f);
  if (bias.defined()) Rows(bias.unsqueeze(0)).read(0, 1, 0, n, start.data(), n);
  const auto factor = static_cast<float>(alpha);
  at::parallel_for(0, (m + kRows - 1) / kRows, grain(kRows * n * r), [&](int64_t begin, int64_t end) {
    std::vector<float> few(kRows * r, 0.0f);
    float sums[kRows * kWidth], values[kRows * kWidth];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kRows, count = std::min(kRows, m - first);
      const float* terms = from + first * r;
      if (count < kRows) {
        std::copy_n(terms, count * r, few.data());
        terms = few.data();
      }
      for (int64_t column = 0; column < n; column += kWidth) {
        const int64_t width = std::min(kWidth, n - column);
        std::fill_n(sums, kRows * kWidth, 0.0f);
        for (int64_t at = 0; at < r; at += kTerms)
          for (int64_t lane = 0; lane < width; lane += kLanes)
            add_tile(terms + at, r, 1, packed.data + at * packed.row + column + lane, packed.row,
                     std::min(kTerms, r - at), sums + lane, kWidth);
        if (onto.defined()) {
          before.read(first, count, column, width, values, kWidth);
        } else {
          std::fill_n(values, kRows * kWidth, 0.0f);
        }
        finish(values, sums, start.data() + column, factor, count, width, kWidth);
        out.write(first, count, column, width, values, kWidth);
      }
    }
  });
}

}  // namespace peft_fused::narrow
