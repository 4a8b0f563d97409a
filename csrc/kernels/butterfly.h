// FFT convolution and correlation of pairs of real rows, one complex row per block. Device code.
//
// Everything is written as phases: what each thread of the block does between two barriers.
//
// The transform is Stockham's autosort: natural order in and out, no bit reversal. Each thread keeps its butterflies in
// registers between reading and writing, so that one buffer holds the row: half the shared memory of the usual two, for
// one barrier more per pass. There are as many threads as make one radix-8 butterfly each.
//
// Two real rows x0, x1 travel as z = x0 + i x1. A real kernel maps re to re and im to im, so a convolution never takes
// them apart. An inverse transform is conj(FFT(conj(.))) / length; the last conj and the division happen on the way
// out.
//
// Rounding errors are a share of the norm of the pair. So that no row drowns in its partner's, each is divided by a
// power of two that brings its norm to 1 .. 2, and multiplied by the same at the end: neither rounds anything but what
// is a denormal afterwards.
#pragma once
#include <cstring>
#include <limits>

#include "fft_plan.h"
#include "rows.h"

namespace peft_fused {

static_assert(kFftPoints == kVector, "a thread loads its points as one block of rows.h");

struct alignas(8) Complex {
  float re, im;
};

PEFT_FUSED_DEVICE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
PEFT_FUSED_DEVICE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
PEFT_FUSED_DEVICE Complex operator*(float s, Complex a) { return {s * a.re, s * a.im}; }
PEFT_FUSED_DEVICE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
PEFT_FUSED_DEVICE Complex conj(Complex a) { return {a.re, -a.im}; }
PEFT_FUSED_DEVICE Complex minus_i(Complex a) { return {a.im, -a.re}; }  // -i a

// From a table that no kernel writes.
PEFT_FUSED_DEVICE Complex read_table(const Complex* p) {
  const float2 v = __ldg(reinterpret_cast<const float2*>(p));
  return {v.x, v.y};
}

// Forward transforms of R points in place, natural order in and out.
PEFT_FUSED_DEVICE void butterfly(Complex (&v)[2]) {
  const Complex a = v[0], b = v[1];
  v[0] = a + b;
  v[1] = a - b;
}

PEFT_FUSED_DEVICE void butterfly(Complex (&v)[3]) {
  constexpr float sin60 = 0.866025403784438647f;
  const Complex sum = v[1] + v[2], turned = sin60 * minus_i(v[1] - v[2]), middle = v[0] - 0.5f * sum;
  v[0] = v[0] + sum;
  v[1] = middle + turned;
  v[2] = middle - turned;
}

PEFT_FUSED_DEVICE void butterfly(Complex (&v)[4]) {
  const Complex a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = minus_i(v[1] - v[3]);
  v[0] = a + c;
  v[1] = b + d;
  v[2] = a - c;
  v[3] = b - d;
}

PEFT_FUSED_DEVICE void butterfly(Complex (&v)[5]) {
  constexpr float cos72 = 0.309016994374947424f, cos144 = -0.809016994374947424f;
  constexpr float sin72 = 0.951056516295153572f, sin144 = 0.587785252292473129f;
  const Complex outer = v[1] + v[4], inner = v[2] + v[3];
  const Complex outer_i = minus_i(v[1] - v[4]), inner_i = minus_i(v[2] - v[3]);
  const Complex even1 = v[0] + cos72 * outer + cos144 * inner, even2 = v[0] + cos144 * outer + cos72 * inner;
  const Complex odd1 = sin72 * outer_i + sin144 * inner_i, odd2 = sin144 * outer_i - sin72 * inner_i;
  v[0] = v[0] + outer + inner;
  v[1] = even1 + odd1;
  v[2] = even2 + odd2;
  v[3] = even2 - odd2;
  v[4] = even1 - odd1;
}

PEFT_FUSED_DEVICE void butterfly(Complex (&v)[8]) {
  constexpr float sin45 = 0.707106781186547524f;
  Complex even[4] = {v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]};
  const Complex d1 = v[1] - v[5], d3 = v[3] - v[7];
  Complex odd[4] = {v[0] - v[4], sin45 * (d1 + minus_i(d1)), minus_i(v[2] - v[6]), sin45 * (minus_i(d3) - d3)};
  butterfly(even);
  butterfly(odd);
  PEFT_FUSED_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = even[i];
    v[2 * i + 1] = odd[i];
  }
}

// Where point i lies in the buffer. Of the accesses of one half warp (64-bit ones are served by halves) no two meet in
// a bank, be their stride 1 (reads), 8 (rows in and out, first pass) or runs of 8 at stride 64 (second pass); odd
// radices and lengths keep a few conflicts. A map within blocks of 16, of which fft_buffer is a multiple.
PEFT_FUSED_DEVICE int place(int i) { return i ^ ((i >> 3) & 15); }

// index / span by the reciprocal of the plan.
PEFT_FUSED_DEVICE int fft_quotient(int index, uint32_t reciprocal) {
  return static_cast<int>((static_cast<uint64_t>(index) * reciprocal) >> 31);
}

// Butterflies of radix R that a thread may have to do in one pass.
constexpr int fft_turns(int radix) { return (kFftPoints + radix - 1) / radix; }

// What a thread keeps from one phase to the next: its butterflies, of which radix 5 has the most points.
struct Registers {
  Complex held[fft_turns(5) * 5];
};

// The threads of a block.
class Team {
 public:
  PEFT_FUSED_DEVICE int size() const { return static_cast<int>(blockDim.x); }
  template <typename Phase>
  PEFT_FUSED_DEVICE void run(const Phase& phase) {
    int thread = static_cast<int>(threadIdx.x);
    // Hides that all phases see the same number: their addresses would be computed once for all and fill registers.
    asm volatile("" : "+r"(thread));
    phase(thread, registers_);
    __syncthreads();
  }

 private:
  Registers registers_;
};

// *target = the largest of itself and the values of all threads, or their sum modulo 2^32: integers, so that the order
// is of no influence. Every thread of a phase calls it, and none reads *target before the next phase.
PEFT_FUSED_DEVICE void join_largest(int thread, uint32_t* target, uint32_t value) {
  value = __reduce_max_sync(0xFFFFFFFFu, value);
  if (thread % 32 == 0) atomicMax(target, value);
}

PEFT_FUSED_DEVICE void join_sum(int thread, uint32_t* target, uint32_t value) {
  value = __reduce_add_sync(0xFFFFFFFFu, value);
  if (thread % 32 == 0) atomicAdd(target, value);
}

// One pass over z. read(i) is point i of the row before the first pass.
template <int R, typename Read>
PEFT_FUSED_DEVICE void run_pass(Team& team, int length, const FftPass& pass, const Complex* twiddles, Complex* z,
                                const Read& read) {
  const int butterflies = length / R, span = pass.span;
  team.run([&](int thread, Registers& own) {
    PEFT_FUSED_UNROLL
    for (int turn = 0; turn < fft_turns(R); ++turn) {
      const int j = thread + turn * team.size();
      if (j >= butterflies) continue;
      Complex v[R];
      if (span == 1) {
        PEFT_FUSED_UNROLL
        for (int r = 0; r < R; ++r) v[r] = read(j + r * butterflies);
      } else {
        const Complex* w = twiddles + (j - fft_quotient(j, pass.reciprocal) * span);
        v[0] = z[place(j)];
        PEFT_FUSED_UNROLL
        for (int r = 1; r < R; ++r) v[r] = read_table(w + span * r) * z[place(j + r * butterflies)];
      }
      butterfly(v);
      PEFT_FUSED_UNROLL
      for (int r = 0; r < R; ++r) own.held[turn * R + r] = v[r];
    }
  });
  team.run([&](int thread, Registers& own) {
    PEFT_FUSED_UNROLL
    for (int turn = 0; turn < fft_turns(R); ++turn) {
      const int j = thread + turn * team.size();
      if (j >= butterflies) continue;
      const int first = j + fft_quotient(j, pass.reciprocal) * span * (R - 1);
      PEFT_FUSED_UNROLL
      for (int r = 0; r < R; ++r) z[place(first + r * span)] = own.held[turn * R + r];
    }
  });
}

struct FftTables {
  const FftPlan& plan;
  const Complex* twiddles;
  const Complex* spectrum;
};

// z = FFT(read(0), read(1), ...); read may read z, each point being read before any is written.
template <typename Read>
PEFT_FUSED_DEVICE void transform(Team& team, const FftTables& tables, Complex* z, const Read& read) {
  const FftPlan& plan = tables.plan;
  for (int i = 0; i < plan.count; ++i) {
    const FftPass& pass = plan.passes[i];
    switch (pass.radix) {
      case 8: run_pass<8>(team, plan.length, pass, tables.twiddles, z, read); break;
      case 5: run_pass<5>(team, plan.length, pass, tables.twiddles, z, read); break;
      case 4: run_pass<4>(team, plan.length, pass, tables.twiddles, z, read); break;
      case 3: run_pass<3>(team, plan.length, pass, tables.twiddles, z, read); break;
      default: run_pass<2>(team, plan.length, pass, tables.twiddles, z, read);
    }
  }
  // A row of one point is its own transform.
  if (plan.count == 0) team.run([&](int thread, Registers&) { if (thread == 0) z[0] = read(0); });
}

PEFT_FUSED_DEVICE void forward(Team& team, const FftTables& tables, Complex* z) {
  transform(team, tables, z, [&](int i) { return z[place(i)]; });
}

// z = length * conj(IFFT(spectrum . z)), or with the spectrum's conjugate.
PEFT_FUSED_DEVICE void multiply_and_return(Team& team, const FftTables& tables, bool conjugate, Complex* z) {
  transform(team, tables, z, [&](int i) {
    const Complex k = read_table(tables.spectrum + i);
    return conj((conjugate ? conj(k) : k) * z[place(i)]);
  });
}

// What the norms of the two rows of a pair are measured with.
struct PairNorms {
  uint32_t largest[2];  // magnitude: the bits of a float without its sign, ordered like it, infinities and NaNs on top
  uint32_t squares[2];  // sum of squares of the row over 2^floor(log2(largest)), in units of 2^-kSquareBits
};
static_assert(sizeof(PairNorms) == kFftNorms, "fft_plan.h says how much shared memory a pair takes");

// kFftLongest squares below 4 stay below 2^32, and that of the largest element counts at least 1.
constexpr int kSquareBits = 16;
static_assert(kFftLongest * 4LL << kSquareBits < 1LL << 32, "a sum of squares fits");

// A pair in shared memory.
struct PairBuffer {
  Complex* z;
  PairNorms* norms;
};

PEFT_FUSED_DEVICE uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

// 2^exponent, -126 <= exponent <= 127.
PEFT_FUSED_DEVICE float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

PEFT_FUSED_DEVICE int log2_floor(uint32_t v) { return 31 - __clz(static_cast<int>(v)); }

// Times `unit` and 2^exponent, -252 <= exponent <= 252: in two halves, so that nothing on the way is out of range where
// the result is not.
struct Scale {
  float first, second;
};
PEFT_FUSED_DEVICE Scale scale_of(int exponent, float unit) {
  const int half = exponent >> 1;
  return {unit * power_of_two(half), power_of_two(exponent - half)};
}
PEFT_FUSED_DEVICE float operator*(const Scale& s, float v) { return s.second * (s.first * v); }
PEFT_FUSED_DEVICE Complex operator*(const Scale& s, Complex v) { return {s * v.re, s * v.im}; }

constexpr uint32_t kInfinityBits = 0x7F800000u;

// floor(log2(largest)), denormals included; 0 where a row is zero or not finite.
PEFT_FUSED_DEVICE int largest_exponent(uint32_t largest) {
  if (largest == 0 || largest >= kInfinityBits) return 0;
  const int exponent = static_cast<int>(largest >> 23);
  return exponent ? exponent - 127 : log2_floor(largest) - 149;
}

// floor(log2(norm)) less largest_exponent; 0 where a row is zero or not finite.
PEFT_FUSED_DEVICE int norm_exponent(uint32_t squares) { return squares ? (log2_floor(squares) - kSquareBits) >> 1 : 0; }

// What brings back a row: times unit 2^exponent. Zeros travel in place of a row that is not finite, and it becomes NaN;
// a zero row loses what rounding its partner's points left in it.
struct RowScale {
  int exponent;
  float unit;
};
PEFT_FUSED_DEVICE RowScale row_scale(const PairNorms& norms, int i) {
  const uint32_t largest = norms.largest[i];
  const float unit = largest == 0 ? 0.f : largest < kInfinityBits ? 1.f : std::numeric_limits<float>::quiet_NaN();
  return {largest_exponent(largest) + norm_exponent(norms.squares[i]), unit};
}

// The two rows of a pair, kVector columns of each.
struct PairBlock {
  float row[2][kVector];
};

// pair.z = the pair that load(column, block) brings, each row over its power of two, which follows from pair.norms. The
// rows wait in registers for it: they are loaded once.
template <typename Load>
PEFT_FUSED_DEVICE void take_pair(Team& team, int length, const PairBuffer& pair, const Load& load) {
  PairNorms& norms = *pair.norms;
  team.run([&](int thread, Registers&) {
    if (thread == 0) norms = PairNorms{};
  });
  team.run([&](int thread, Registers& own) {
    PairBlock block{};
    if (thread * kVector < length) load(thread * kVector, block);
    PEFT_FUSED_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t largest = 0;
      PEFT_FUSED_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const uint32_t magnitude = bits_of(block.row[i][j]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
      }
      join_largest(thread, &norms.largest[i], largest);
    }
    PEFT_FUSED_UNROLL
    for (int j = 0; j < kVector; ++j) own.held[j] = {block.row[0][j], block.row[1][j]};
  });
  team.run([&](int thread, Registers& own) {
    PEFT_FUSED_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool finite = norms.largest[i] < kInfinityBits;
      const Scale scale = scale_of(-largest_exponent(norms.largest[i]), 1.f);
      float squares = 0.f;
      PEFT_FUSED_UNROLL
      for (int j = 0; j < kVector; ++j) {
        float& v = i == 0 ? own.held[j].re : own.held[j].im;
        v = finite ? scale * v : 0.f;
        squares += v * v;
      }
      join_sum(thread, &norms.squares[i], static_cast<uint32_t>(squares * (1 << kSquareBits)));
    }
  });
  team.run([&](int thread, Registers& own) {
    const int column = thread * kVector;
    if (column >= length) return;
    const float re = power_of_two(-norm_exponent(norms.squares[0]));
    const float im = power_of_two(-norm_exponent(norms.squares[1]));
    PEFT_FUSED_UNROLL
    for (int j = 0; j < kVector; ++j) pair.z[place(column + j)] = {re * own.held[j].re, im * own.held[j].im};
  });
}

// store(column, block) of factor * conj(z), the rows at their own scales again.
template <typename Store>
PEFT_FUSED_DEVICE void give_pair(Team& team, int length, float factor, const PairBuffer& pair, const Store& store) {
  team.run([&](int thread, Registers&) {
    const int column = thread * kVector;
    if (column >= length) return;
    PairBlock block;
    PEFT_FUSED_UNROLL
    for (int j = 0; j < kVector; ++j) {
      const Complex point = factor * conj(pair.z[place(column + j)]);
      block.row[0][j] = point.re;
      block.row[1][j] = point.im;
    }
    PEFT_FUSED_UNROLL
    for (int i = 0; i < 2; ++i) {
      const RowScale row = row_scale(*pair.norms, i);
      const Scale scale = scale_of(row.exponent, row.unit);
      PEFT_FUSED_UNROLL
      for (int j = 0; j < kVector; ++j) block.row[i][j] = scale * block.row[i][j];
    }
    store(column, block);
  });
}

// The parts of the fft_convolve_shared bytes of a block.
PEFT_FUSED_DEVICE PairBuffer convolve_buffer(Complex* shared, int length) {
  return {shared, reinterpret_cast<PairNorms*>(shared + fft_buffer(length))};
}

// One pair of rows of fft_convolve (fft.h).
template <typename Load, typename Store>
PEFT_FUSED_DEVICE void convolve_pair(Team& team, const FftTables& tables, bool conjugate, float scale,
                                     const PairBuffer& pair, const Load& load, const Store& store) {
  const int length = tables.plan.length;
  take_pair(team, length, pair, load);
  forward(team, tables, pair.z);
  multiply_and_return(team, tables, conjugate, pair.z);
  give_pair(team, length, scale / static_cast<float>(length), pair, store);
}

// The buffers of correlate_rows. FFT(x) waits in one for FFT(dy) in another. The sum is that of real rows, so that half
// a spectrum holds it: all three then fit a block of every supported GPU at the longest length, where registers would
// spill with 1024 threads.
struct CorrelateBuffers {
  PairBuffer x, dy;
  Complex* sum;
};

// The parts of the fft_correlate_shared bytes of a block.
PEFT_FUSED_DEVICE CorrelateBuffers correlate_buffers(Complex* shared, int length) {
  Complex *const dy = shared + fft_buffer(length), *const sum = dy + fft_buffer(length);
  PairNorms* const norms = reinterpret_cast<PairNorms*>(sum + fft_half(length));
  return {{shared, norms}, {dy, norms + 1}, sum};
}

// point(k) for those of the points 0 .. length / 2 that are this thread's.
template <typename Point>
PEFT_FUSED_DEVICE void half_spectrum(const Team& team, int length, int thread, const Point& point) {
  for (int k = thread; k < fft_half(length); k += team.size()) point(k);
}

// What row i of a pair counts in the sum: its spectra are half of Z[k] + conj Z[length - k] for the first row, and of
// Z[k] - conj Z[length - k], a quarter turn away, for the second; the turn is the same in x and dy. Beyond the range of
// a Scale the product is beyond that of a float.
PEFT_FUSED_DEVICE Scale product_scale(const PairBuffer& x, const PairBuffer& dy, int i) {
  const RowScale a = row_scale(*x.norms, i), b = row_scale(*dy.norms, i);
  const int exponent = a.exponent + b.exponent - 2;
  return scale_of(exponent < -252 ? -252 : exponent > 252 ? 252 : exponent, a.unit * b.unit);
}

// Rows begin .. end - 1, begin even, of fft_correlate (fft.h), into one partial sum.
template <typename LoadX, typename LoadDy, typename StoreDx>
PEFT_FUSED_DEVICE void correlate_rows(Team& team, const FftTables& tables, bool conjugate, float scale, bool want_dx,
                                      int64_t begin, int64_t end, const CorrelateBuffers& buffers, Complex* partial,
                                      const LoadX& load_x, const LoadDy& load_dy, const StoreDx& store_dx) {
  const int length = tables.plan.length;
  const PairBuffer x = buffers.x, dy = buffers.dy;
  Complex* const sum = buffers.sum;
  team.run([&](int thread, Registers&) {
    half_spectrum(team, length, thread, [&](int k) { sum[k] = {0.f, 0.f}; });
  });
  for (int64_t row = begin; row < end; row += 2) {
    take_pair(team, length, x, [&](int column, PairBlock& block) { load_x(row, column, block); });
    take_pair(team, length, dy, [&](int column, PairBlock& block) { load_dy(row, column, block); });
    forward(team, tables, x.z);
    forward(team, tables, dy.z);
    team.run([&](int thread, Registers&) {
      const Scale first = product_scale(x, dy, 0), second = product_scale(x, dy, 1);
      half_spectrum(team, length, thread, [&](int k) {
        const int here = place(k), mirror = place(k == 0 ? 0 : length - k);
        const Complex xk = x.z[here], xm = conj(x.z[mirror]), dyk = dy.z[here], dym = conj(dy.z[mirror]);
        // Both rows first: one rounding of the sum per pair.
        sum[k] = sum[k] + (first * (conj(xk + xm) * (dyk + dym)) + second * (conj(xk - xm) * (dyk - dym)));
      });
    });
    if (want_dx) {
      multiply_and_return(team, tables, !conjugate, dy.z);
      give_pair(team, length, scale / static_cast<float>(length), dy,
                [&](int column, PairBlock& block) { store_dx(row, column, block); });
    }
  }
  team.run([&](int thread, Registers&) {
    half_spectrum(team, length, thread, [&](int k) { partial[k] = conjugate ? conj(sum[k]) : sum[k]; });
  });
}

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, stride;  // stride of a row, unit column stride
};

struct Keep {
  const int64_t* seed;  // null: keep everything
  uint32_t threshold;
  float scale;
};

PEFT_FUSED_DEVICE void keep_pair(const Keep& keep, int64_t row, int column, PairBlock& block) {
  if (!keep.seed) return;
  PEFT_FUSED_UNROLL
  for (int i = 0; i < 2; ++i)
    apply_keep(block.row[i], static_cast<uint64_t>(*keep.seed), column, row + i, keep.threshold, keep.scale);
}

// Rows row and row + 1, zero where the matrix ends.
template <typename T>
PEFT_FUSED_DEVICE void load_pair(const Matrix<const T>& m, int64_t row, int column, PairBlock& block) {
  PEFT_FUSED_UNROLL
  for (int i = 0; i < 2; ++i) {
    const T* source = m.data + (row + i) * m.stride;
    load_row(source, column, row + i < m.rows ? m.columns : 0, vector_aligned(source), block.row[i]);
  }
}

// The same for writing, added to the rows of `add` where there are such.
template <typename T>
PEFT_FUSED_DEVICE void store_pair(const Matrix<T>& m, const Matrix<const T>& add, int64_t row, int column,
                                  PairBlock& block) {
  if (add.data) {
    PairBlock base;
    load_pair(add, row, column, base);
    PEFT_FUSED_UNROLL
    for (int i = 0; i < 2; ++i)
      PEFT_FUSED_UNROLL
      for (int j = 0; j < kVector; ++j) block.row[i][j] += base.row[i][j];
  }
  PEFT_FUSED_UNROLL
  for (int i = 0; i < 2; ++i) {
    T* target = m.data + (row + i) * m.stride;
    if (row + i < m.rows) store_row(target, column, m.columns, vector_aligned(target), block.row[i]);
  }
}

}  // namespace peft_fused
