#include "narrow.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PEFT_FUSED_VECTORS
// Vectors are handed on in functions that are all inlined: how they would be passed to others is no matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#define PEFT_FUSED_INLINE inline __attribute__((always_inline))
#define PEFT_FUSED_INLINE_BODY __attribute__((always_inline))
#endif

namespace peft_fused::narrow {

using at::Tensor;

#ifdef PEFT_FUSED_VECTORS

namespace {

constexpr int64_t kTerms = 32;  // of a sum in one chain, which keeps the error that a library's product has
// What one visit works on: rows and lanes of a product with few columns, ranks and columns of a sum over rows, rows and
// columns of a product that is added.
constexpr int kRows = 12, kLanes = 16, kRanks = 8, kColumns = 48, kWidth = 32;
constexpr int64_t kMostRanks = 64;
constexpr int64_t kGrain = 1 << 18;        // multiply-adds that are worth a thread
constexpr int64_t kSmallFactor = 1 << 12;  // elements of a factor that are worth packing for less than kRows rows

enum class Cpu { other, avx2, avx512 };

// As torch's own kernels choose, which ATEN_CPU_CAPABILITY can lower.
Cpu cpu() {
  static const Cpu found = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Cpu::avx512 : capability == "AVX2" ? Cpu::avx2 : Cpu::other;
  }();
  return found;
}

// L floats, as many bits, and the halves of these.
template <int L>
struct Vectors {
  typedef float Floats __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
  typedef uint16_t Halves __attribute__((vector_size(L * 2), aligned(2), may_alias));
};

// Runs body(L) in code for vectors of L floats, all of which is inlined into it.
template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void on_avx512(const Body& body) {
  body(std::integral_constant<int, 16>{});
}

template <typename Body>
__attribute__((target("avx2,fma"))) void on_avx2(const Body& body) {
  body(std::integral_constant<int, 8>{});
}

template <typename Body>
void on_this_cpu(const Body& body) {
  cpu() == Cpu::avx512 ? on_avx512(body) : on_avx2(body);
}

// Registers hold R rows of V vectors of sums. A block of more is done in parts.
template <int L, int ROWS, int COLUMNS>
struct Tile {
  static constexpr bool wide = L == 16;
  static constexpr int R = wide ? ROWS : ROWS / 2, V = wide || COLUMNS % (3 * L) == 0 ? std::min(COLUMNS / L, 3) : 2;
  static_assert(ROWS % R == 0 && COLUMNS % (V * L) == 0 && (R + 1) * V < (wide ? 32 : 16));
  using Floats = typename Vectors<L>::Floats;

  Floats sums[R][V];

  // sums(i, j) = sum over k of s(i, k) p(k, j)
  PEFT_FUSED_INLINE Tile(const float* s, int64_t s_row, int64_t s_step, const float* p, int64_t p_step, int64_t terms) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = Floats{};
    for (int64_t k = 0; k < terms; ++k) {
      Floats row[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) row[j] = *reinterpret_cast<const Floats*>(p + k * p_step + j * L);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] += row[j] * s[i * s_row + k * s_step];
    }
  }

  // out(i, :) += sums(i, :)
  PEFT_FUSED_INLINE void add_to(float* out, int64_t out_row) const {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) *reinterpret_cast<Floats*>(out + i * out_row + j * L) += sums[i][j];
  }
};

// out(i, j) += sum over k of s(i, k) p(k, j), for ROWS rows of COLUMNS.
template <int L, int ROWS, int COLUMNS>
PEFT_FUSED_INLINE void add_sums(const float* s, int64_t s_row, int64_t s_step, const float* p, int64_t p_step,
                                int64_t terms, float* out, int64_t out_row) {
  using T = Tile<L, ROWS, COLUMNS>;
  for (int i = 0; i < ROWS; i += T::R)
    for (int j = 0; j < COLUMNS; j += T::V * L)
      T(s + i * s_row, s_row, s_step, p + j, p_step, terms).add_to(out + i * out_row + j, out_row);
}

// ------------------------------------------------------------------------------------------------------- fp32 and bf16

template <int L>
PEFT_FUSED_INLINE typename Vectors<L>::Floats load(const float* from) {
  return *reinterpret_cast<const typename Vectors<L>::Floats*>(from);
}

template <int L>
PEFT_FUSED_INLINE typename Vectors<L>::Floats load(const uint16_t* from) {
  using Bits = typename Vectors<L>::Bits;
  const auto halves = *reinterpret_cast<const typename Vectors<L>::Halves*>(from);
  return reinterpret_cast<typename Vectors<L>::Floats>(__builtin_convertvector(halves, Bits) << 16);
}

template <int L>
PEFT_FUSED_INLINE void store(float* to, const typename Vectors<L>::Floats& values) {
  *reinterpret_cast<typename Vectors<L>::Floats*>(to) = values;
}

// To nearest, ties to even; a NaN stays one.
template <int L>
PEFT_FUSED_INLINE void store(uint16_t* to, const typename Vectors<L>::Floats& values) {
  using Halves = typename Vectors<L>::Halves;
  const auto bits = reinterpret_cast<typename Vectors<L>::Bits>(values);
  const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const auto chosen = values != values ? typename Vectors<L>::Bits{} + 0x7FC0 : rounded;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(chosen, Halves);
}

PEFT_FUSED_INLINE float value_of(float value) { return value; }
PEFT_FUSED_INLINE float value_of(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

// Rows of fp32, or of bf16 as its bits, in fp32.
template <typename T>
PEFT_FUSED_INLINE void widen(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] = value_of(from[i * from_row + j]);
}

template <typename T>
PEFT_FUSED_INLINE void copy_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_row, from + i * from_row, columns * sizeof(T));
}

// y = onto + start + factor * s q, for kRows rows of kWidth; onto null for none, CHAINS for more than one chain of ranks.
template <int L, bool CHAINS, typename T>
PEFT_FUSED_INLINE void add_block(const float* s, int64_t ranks, const float* q, int64_t q_row, float factor,
                                 const float* start, const T* onto, int64_t onto_row, T* y, int64_t y_row) {
  using Part = Tile<L, kRows, kWidth>;
  float further[CHAINS ? kRows * kWidth : 1] = {};  // sums of all chains but the first
  if constexpr (CHAINS) {
    for (int64_t at = kTerms; at < ranks; at += kTerms)
      add_sums<L, kRows, kWidth>(s + at, ranks, 1, q + at * q_row, q_row, std::min(kTerms, ranks - at), further, kWidth);
  }
  for (int i0 = 0; i0 < kRows; i0 += Part::R)
    for (int j0 = 0; j0 < kWidth; j0 += Part::V * L) {
      const Part part(s + i0 * ranks, ranks, 1, q + j0, q_row, std::min(kTerms, ranks));
#pragma GCC unroll 16
      for (int i = 0; i < Part::R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < Part::V; ++j) {
          const int64_t row = i0 + i, column = j0 + j * L;
          auto sum = part.sums[i][j];
          if constexpr (CHAINS) sum += load<L>(further + row * kWidth + column);
          auto value = factor * sum + load<L>(start + column);
          if (onto != nullptr) value += load<L>(onto + row * onto_row + column);
          store<L>(y + row * y_row + column, value);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- operands

int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix in fp32 whose rows are dense and as long as a multiple of this: itself, or a copy with zeros behind.
struct Packed {
  const float* data;
  int64_t row;
  std::vector<float> copy;

  Packed(const Tensor& t, int64_t multiple) : data(t.const_data_ptr<float>()), row(t.stride(0)) {
    const int64_t rows = t.size(0), columns = t.size(1);
    if (t.stride(1) == 1 && columns % multiple == 0) return;
    const int64_t row_step = t.stride(0), column_step = t.stride(1);
    row = padded(columns, multiple);
    copy.resize(rows * row);
    // By squares, of which a cache line of either side is used up.
    constexpr int64_t kSquare = 16;
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare)
      for (int64_t j0 = 0; j0 < columns; j0 += kSquare)
        for (int64_t i = i0; i < std::min(i0 + kSquare, rows); ++i)
          for (int64_t j = j0; j < std::min(j0 + kSquare, columns); ++j)
            copy[i * row + j] = data[i * row_step + j * column_step];
    data = copy.data();
  }
};

bool dense_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) == 1; }

int64_t grain(int64_t multiply_adds) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiply_adds)); }

// body(L, data) on a share of `count` blocks, in code for this CPU and for the type of t, whose elements data points to.
template <typename Body>
void for_blocks(int64_t count, int64_t multiply_adds, const Tensor& t, const Body& body) {
  TORCH_INTERNAL_ASSERT(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16);
  at::parallel_for(0, count, grain(multiply_adds), [&](int64_t begin, int64_t end) {
    on_this_cpu([&](auto lanes) PEFT_FUSED_INLINE_BODY {
      if (t.scalar_type() == at::kFloat) {
        body(lanes, static_cast<const float*>(t.const_data_ptr()), begin, end);
      } else {
        body(lanes, static_cast<const uint16_t*>(t.const_data_ptr()), begin, end);
      }
    });
  });
}

}  // namespace

bool serves(const Tensor& x, int64_t others, at::ScalarType adapter, int64_t ranks) {
  return cpu() != Cpu::other && x.is_cpu() && adapter == at::kFloat && ranks <= kMostRanks && x.numel() > 0 &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
         (x.size(0) >= kRows || std::max(x.size(1), others) * padded(ranks, kLanes) <= kSmallFactor);
}

Tensor times(const Tensor& x, const Tensor& p, double alpha) {
  const int64_t m = x.size(0), k = x.size(1), r = p.size(1), lanes = padded(r, kLanes);
  const Tensor rows = dense_rows(x) ? x : x.contiguous();
  const int64_t row = rows.stride(0);
  const Packed packed(p, kLanes);
  const Tensor out = at::empty({m, r}, p.options());
  float* const to = out.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(alpha);
  for_blocks((m + kRows - 1) / kRows, kRows * k * lanes, rows, [&](auto L, const auto* data, int64_t begin, int64_t end)
                                                                   PEFT_FUSED_INLINE_BODY {
    constexpr bool as_it_is = std::is_same_v<decltype(data), const float*>;
    std::vector<float> few(kRows * kTerms), sums(kRows * lanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min<int64_t>(kRows, m - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t at = 0; at < k; at += kTerms) {
        const int64_t terms = std::min(kTerms, k - at);
        const float* from = few.data();
        int64_t step = kTerms;
        if (as_it_is && count == kRows) {
          from = reinterpret_cast<const float*>(data + first * row + at), step = row;
        } else {
          widen(data + first * row + at, row, count, terms, few.data(), kTerms);
        }
        const float* factors = packed.data + at * packed.row;
        int64_t lane = 0;
        for (; lane + 2 * kLanes <= lanes; lane += 2 * kLanes)
          add_sums<L, kRows, 2 * kLanes>(from, step, 1, factors + lane, packed.row, terms, sums.data() + lane, lanes);
        if (lane < lanes)
          add_sums<L, kRows, kLanes>(from, step, 1, factors + lane, packed.row, terms, sums.data() + lane, lanes);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < r; ++j) to[(first + i) * r + j] = factor * sums[i * lanes + j];
    }
  });
  return out;
}

Tensor over_rows(const Tensor& s, const Tensor& x, double alpha, bool transposed) {
  const int64_t m = x.size(0), k = x.size(1), r = s.size(1), ranks = padded(r, kRanks);
  const Tensor rows = dense_rows(x) ? x : x.contiguous();
  const int64_t row = rows.stride(0);
  const Packed packed(s, kRanks);
  const Tensor out = at::empty({transposed ? k : r, transposed ? r : k}, s.options());
  const int64_t of_rank = transposed ? 1 : k, of_column = transposed ? r : 1;
  float* const to = out.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(alpha);
  for_blocks((k + kColumns - 1) / kColumns, kColumns * m * ranks, rows,
             [&](auto L, const auto* data, int64_t begin, int64_t end) PEFT_FUSED_INLINE_BODY {
    constexpr bool as_it_is = std::is_same_v<decltype(data), const float*>;
    std::vector<float> few(kTerms * kColumns), sums(ranks * kColumns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, columns = std::min<int64_t>(kColumns, k - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t at = 0; at < m; at += kTerms) {
        const int64_t terms = std::min(kTerms, m - at);
        const float* from = few.data();
        int64_t step = kColumns;
        if (as_it_is && columns == kColumns) {
          from = reinterpret_cast<const float*>(data + at * row + first), step = row;
        } else {
          widen(data + at * row + first, row, terms, columns, few.data(), kColumns);
        }
        for (int64_t rank = 0; rank < ranks; rank += kRanks)
          add_sums<L, kRanks, kColumns>(packed.data + at * packed.row + rank, 1, packed.row, from, step, terms,
                                        sums.data() + rank * kColumns, kColumns);
      }
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = 0; j < columns; ++j)
          to[i * of_rank + (first + j) * of_column] = factor * sums[i * kColumns + j];
    }
  });
  return out;
}

void add_product(const Tensor& y, const Tensor& onto, const Tensor& bias, const Tensor& s, const Tensor& q,
                 double alpha) {
  const int64_t m = y.size(0), n = y.size(1), r = s.size(1), row = y.stride(0);
  TORCH_INTERNAL_ASSERT(dense_rows(y));  // another would be written to a copy
  const Tensor before = !onto.defined() || dense_rows(onto) ? onto : onto.contiguous();
  const int64_t before_row = before.defined() ? before.stride(0) : 0;
  const Packed packed(q, kWidth);
  const Tensor factors = s.contiguous();
  const float* const from = factors.const_data_ptr<float>();
  std::vector<float> start(padded(n, kWidth), 0.0f);
  if (bias.defined()) {
    const Tensor wide = bias.to(at::kFloat).contiguous();
    std::copy_n(wide.const_data_ptr<float>(), n, start.data());
  }
  const auto factor = static_cast<float>(alpha);
  for_blocks((m + kRows - 1) / kRows, kRows * n * r, y, [&](auto L, const auto* data, int64_t begin, int64_t end)
                                                            PEFT_FUSED_INLINE_BODY {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    const T* const old = before.defined() ? static_cast<const T*>(before.const_data_ptr()) : nullptr;
    std::vector<float> few(kRows * r, 0.0f);
    T edge[kRows * kWidth] = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min<int64_t>(kRows, m - first);
      const float* terms = from + first * r;
      if (count < kRows) {
        std::copy_n(terms, count * r, few.data());
        terms = few.data();
      }
      for (int64_t column = 0; column < n; column += kWidth) {
        const int64_t width = std::min<int64_t>(kWidth, n - column);
        T* const out = to + first * row + column;
        const T* const in = old != nullptr ? old + first * before_row + column : nullptr;
        const bool whole = count == kRows && width == kWidth;
        if (!whole && in != nullptr) copy_rows(in, before_row, count, width, edge, kWidth);
        const auto add = [&](auto chains) PEFT_FUSED_INLINE_BODY {
          add_block<L, chains>(terms, r, packed.data + column, packed.row, factor, start.data() + column,
                                 whole || in == nullptr ? in : edge, whole ? before_row : kWidth,
                                 whole ? out : edge, whole ? row : kWidth);
        };
        r > kTerms ? add(std::true_type{}) : add(std::false_type{});
        if (!whole) copy_rows(edge, kWidth, count, width, out, row);
      }
    }
  });
}

#else

bool serves(const Tensor&, int64_t, at::ScalarType, int64_t) { return false; }
Tensor times(const Tensor&, const Tensor&, double) { TORCH_INTERNAL_ASSERT(false); }
Tensor over_rows(const Tensor&, const Tensor&, double, bool) { TORCH_INTERNAL_ASSERT(false); }
void add_product(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double) {
  TORCH_INTERNAL_ASSERT(false);
}

#endif

}  // namespace peft_fused::narrow
