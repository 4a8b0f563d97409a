// The passes of a mixed-radix FFT and their twiddles: host code.
#pragma once
#include <cmath>
#include <cstdint>

namespace peft_fused {

constexpr int kFftLongest = 8192;
constexpr int kFftPoints = 8;   // of a row per thread: one radix-8 butterfly, one block of the dropout convention
constexpr int kFftPasses = 8;   // 3^8 is the length that takes the most
constexpr int kFftRadices[] = {8, 4, 2, 3, 5};

// One pass turns sub-transforms of `span` points into sub-transforms of span * radix points.
struct FftPass {
  int radix, span;
  uint32_t reciprocal;  // of span, for fft_quotient
};

struct FftPlan {
  int length, count;
  FftPass passes[kFftPasses];
};

// Radices of the passes, at most kFftPasses of them. False where length has a prime factor above 5 or is out of range.
inline bool fft_radices(int length, int* radices, int* count) {
  *count = 0;
  if (length < 1 || length > kFftLongest) return false;
  for (const int radix : kFftRadices)
    for (; length % radix == 0; length /= radix) radices[(*count)++] = radix;
  return length == 1;
}

// span >= 1 and index < kFftLongest: 2^31 / span + 1 then never rounds a quotient up to the next integer.
inline uint32_t fft_reciprocal(int span) { return (1u << 31) / static_cast<uint32_t>(span) + 1; }

inline bool fft_plan(int length, FftPlan* plan) {
  int radices[kFftPasses];
  plan->length = length;
  if (!fft_radices(length, radices, &plan->count)) return false;
  for (int i = 0, span = 1; i < plan->count; span *= radices[i++])
    plan->passes[i] = {radices[i], span, fft_reciprocal(span)};
  return true;
}

// Threads of a team, whole warps.
inline int fft_threads(int length) {
  const int busy = (length + kFftPoints - 1) / kFftPoints;
  return (busy + 31) / 32 * 32;
}

// Points of a row in shared memory, see place() in butterfly.h.
constexpr int fft_buffer(int length) { return (length + 15) / 16 * 16; }

// Points 0 .. length / 2, the half of a real row's spectrum that determines the other.
constexpr int fft_half(int length) { return length / 2 + 1; }

// Bytes of shared memory that the norms of a pair of rows take, see PairNorms in butterfly.h.
constexpr int kFftNorms = 16;

// Bytes of shared memory that a block of fft_convolve and of fft_correlate takes.
constexpr int fft_convolve_shared(int length) { return 8 * fft_buffer(length) + kFftNorms; }
constexpr int fft_correlate_shared(int length) {
  return 8 * (2 * fft_buffer(length) + fft_half(length)) + 2 * kFftNorms;
}

// Rows, and so whole pairs of them, that each of `blocks` blocks of fft_correlate takes; the last ones may get fewer.
constexpr int64_t fft_block_rows(int64_t m, int64_t blocks) { return 2 * (((m + 1) / 2 + blocks - 1) / blocks); }

// Twiddles of all passes, `length` complex numbers (re, im) in the order in which neighbouring threads want
// neighbouring ones: entry span * r + k is exp(-2 pi i r k / (span * radix)), 1 <= r < radix, 0 <= k < span. The passes
// fill the table without a gap from entry 1 on; entry 0 is 1 and unused, and so are those of the first pass (span 1).
inline bool fft_twiddles(int length, float* table) {
  FftPlan plan;
  if (!fft_plan(length, &plan)) return false;
  const double turn = -2 * 3.14159265358979323846;
  table[0] = 1, table[1] = 0;
  for (int i = 0; i < plan.count; ++i) {
    const int radix = plan.passes[i].radix, span = plan.passes[i].span;
    for (int r = 1; r < radix; ++r)
      for (int k = 0; k < span; ++k) {
        const double angle = turn * r * k / (span * radix);
        table[2 * (span * r + k)] = static_cast<float>(std::cos(angle));
        table[2 * (span * r + k) + 1] = static_cast<float>(std::sin(angle));
      }
  }
  return true;
}

}  // namespace peft_fused
