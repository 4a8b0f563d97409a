// FFT convolution and correlation of rows in strict fp32, one kernel each, on raw pointers and a stream. Lengths are
// those of fft_radices: 5-smooth, at most kFftLongest; anything else is cudaErrorInvalidValue. So is a length whose
// fft_convolve_shared or fft_correlate_shared bytes are more than a block of the device may have
// (cudaDevAttrMaxSharedMemoryPerBlockOptin); sm_80 and sm_90 have enough for all.
//
// Rows 2 i and 2 i + 1 share one complex transform, zeros taking the place of a missing last one. Each is divided by a
// power of two next to its norm and multiplied by it at the end: the errors of a row do not depend on the magnitude of
// the other, and a zero row stays one. A row with a NaN or an infinity leaves the other alone. Its result is a row of
// NaNs: that of y for x after dropout, that of dx for dy; and either makes all of its block's partial sum NaN.
// |khat| * length must stay within the range of fp32 by some orders, for rows of norm 1 to 2 are what it multiplies.
#pragma once
#include "fft_plan.h"
#include "lowrank.h"

namespace peft_fused {

// A number, or the same in device memory, so that a CUDA graph replays it with another value.
struct FloatControl {
  const float* pointer;
  float value;
};

// y [m, n_out] = add + scale * the first n_out columns of IFFT(K . FFT(drop(x) padded to length)), K = khat, or its
// conjugate: the transpose of the map without. With mask_output x is taken as it is and the convolution is dropped
// before add comes on top: y = add + drop(scale * ...).
struct FftConvolveParams {
  const void* x;         // [m, n_in], row stride x_row, unit column stride
  const void* add;       // [m, n_out] in y's type, row stride add_row; may be y; null without
  void* y;               // [m, n_out], row stride y_row
  const void* khat;      // [length] complex fp32: the transform of a real kernel, natural order, not only half of it
  const void* twiddles;  // [length] complex fp32, from fft_twiddles(length)
  const int64_t* seed;   // null without dropout; element (row, column) draws as in shrink
  int64_t m, x_row, add_row, y_row;
  int n_in, n_out, length;  // n_in, n_out <= length
  uint32_t threshold;
  float keep_scale;
  bool conjugate, mask_output;
  FloatControl scale;
  Type x_type, y_type;
};
cudaError_t fft_convolve(const FftConvolveParams& params, cudaStream_t stream);

// The backward of fft_convolve, with that call's khat, twiddles, seed, conjugate and scale, for upstream gradients dy:
//   dx [m, n_in] = drop(scale * the first n_in columns of IFFT(K' . FFT(dy))), K' the conjugate of K;
//   partial [blocks, fft_half(length)]: its sum over blocks is points 0 .. length / 2 of the sum over rows of
//     conj(FFT(drop(x))) . FFT(dy), conjugated where `conjugate` is set, without scale. That is what an irfft of
//     `length` points takes: scale * irfft(sum, length) is the gradient of all `length` elements of the kernel.
// Block b takes the b-th of `blocks` equal splits of the row pairs, in order: the order of every sum depends on m,
// length and blocks alone.
struct FftCorrelateParams {
  const void* x;         // [m, n_in], row stride x_row, unit column stride
  const void* dy;        // [m, n_out], row stride dy_row
  void* dx;              // [m, n_in] in x's type, row stride dx_row; null when not wanted
  void* partial;         // [blocks, fft_half(length)] complex fp32, every element written
  const void* khat;      // as above, read for dx only
  const void* twiddles;  // as above
  const int64_t* seed;   // null without dropout
  int64_t m, x_row, dy_row, dx_row;
  int n_in, n_out, length;  // n_in, n_out <= length
  int blocks;               // >= 1, for instance fft_correlate_blocks(m, length)
  uint32_t threshold;
  float keep_scale;
  bool conjugate;
  FloatControl scale;  // of dx only
  Type x_type, dy_type;
};
cudaError_t fft_correlate(const FftCorrelateParams& params, cudaStream_t stream);

// As many blocks as the current device runs at once, fewer where there are not as many pairs, more where splits would
// get too long for the accuracy of their partial sums; at least 1.
cudaError_t fft_correlate_blocks(int64_t m, int length, int* blocks);

}  // namespace peft_fused
