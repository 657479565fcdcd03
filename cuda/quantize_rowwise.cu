// Quantizes a weight to int8 with one scale per row and computes its column statistics, in one pass over memory.
//
// Equal, bit for bit, to quantize_rowwise and column_stats of quantize8/kernels/reference.py. A block processes `tile_rows`
// rows, `rows_at_once` of them at a time. Each row is read three times (for its absmax, its codes and the columns), but
// only the first read goes to memory; the others hit the nearest cache. One thread sums a column down a tile in row
// order, and one thread sums it over tiles in tile order (add_tiles), so the sum does not depend on how blocks are
// scheduled. Maxima and counts do not depend on the order anyway.
#include "quantize8.cuh"

constexpr int WARPS = THREADS / 32;

// grid (ceil(rows / tile_rows)), THREADS threads. rows_at_once: a power of two up to WARPS.
// STATS: the column results are updated; otherwise their pointers are not used. A row that cannot be quantized has an
// absmax of infinity or NaN.
extern "C" __global__ void __launch_bounds__(THREADS, STATS ? 1 : 2)
quantize_rowwise(const FLOAT* __restrict__ weight, int8_t* __restrict__ codes, float* __restrict__ absmax,
                 float* tile_square, float* tile_error, uint32_t* column_absmax, int* column_outliers, int64_t rows,
                 int columns, int rows_at_once, int tile_rows) {
  __shared__ uint32_t peaks[WARPS];
  __shared__ int64_t energies[WARPS];
  __shared__ float inverses[WARPS], scales[WARPS];  // of the rows in progress
  __shared__ int limits[WARPS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row_warps = WARPS / rows_at_once;
  const int slot = warp / row_warps, first = (threadIdx.x - slot * row_warps * 32) * VECTOR;
  const int step = row_warps * 32 * VECTOR;
  const int64_t start = (int64_t)blockIdx.x * tile_rows, end = min(start + tile_rows, rows);

  for (int64_t base = start; base < end; base += rows_at_once) {
    const int64_t row = base + slot;
    const int width = row < end ? columns : 0;  // a slot without a row only takes part in the barriers
    const FLOAT* source = weight + row * columns;
    uint32_t peak = 0;
#pragma unroll 4
    for (int k = first; k < width; k += step) {
      float v[VECTOR];
      load_vector(source + k, columns - k, v);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) peak = max(peak, magnitude(to_float(from_float<half>(v[i]))));
    }
    peak = warp_max(peak);
    if (lane == 0) peaks[warp] = peak;
    __syncthreads();
    for (int i = 0; i < row_warps; ++i) peak = max(peak, peaks[slot * row_warps + i]);
    const float inverse = inverse_of(peak);
    if (first == 0) {
      inverses[slot] = inverse;
      scales[slot] = scale_of(__uint_as_float(peak));
      if (width) absmax[row] = __uint_as_float(peak);
    }
    int64_t energy = 0;
#pragma unroll 2
    for (int k = first; k < width; k += step) {
      float v[VECTOR];
      int8_t q[VECTOR];
      int squares = 0;
      load_vector(source + k, columns - k, v);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        q[i] = code_of(to_float(from_float<half>(v[i])), inverse);
        squares += q[i] * q[i];
      }
      store_codes(codes + row * columns + k, columns - k, q);
      energy += squares;
    }
    if (!STATS) {
      __syncthreads();  // peaks can be reused
      continue;
    }
    energy = warp_sum(energy);
    if (lane == 0) energies[warp] = energy;
    __syncthreads();

    const int present = (int)min((int64_t)rows_at_once, end - base);
    if ((int)threadIdx.x < present) {  // a code whose square exceeds the limit is an outlier of its row
      int64_t total = 0;
      for (int i = 0; i < row_warps; ++i) total += energies[threadIdx.x * row_warps + i];
      limits[threadIdx.x] = (int)(OUTLIER_SIGMAS * OUTLIER_SIGMAS * total / columns);
    }
    __syncthreads();
    for (int k = threadIdx.x * VECTOR; k < columns; k += THREADS * VECTOR) {
      const int count = min(VECTOR, columns - k);
      float square[VECTOR] = {}, error[VECTOR] = {};
      uint32_t top[VECTOR] = {};
      int outliers[VECTOR] = {};
      float* const square_sum = tile_square + (int64_t)blockIdx.x * columns + k;
      float* const error_sum = tile_error + (int64_t)blockIdx.x * columns + k;
      if (base > start)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
          if (i < count) square[i] = square_sum[i], error[i] = error_sum[i];
#pragma unroll 2
      for (int r = 0; r < present; ++r) {
        float v[VECTOR];
        load_vector(weight + (base + r) * columns + k, count, v);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          const int code = code_of(to_float(from_float<half>(v[i])), inverses[r]);
          const float missed = __fsub_rn(v[i], __fmul_rn((float)code, scales[r]));
          square[i] = __fadd_rn(square[i], __fmul_rn(v[i], v[i]));
          error[i] = __fadd_rn(error[i], __fmul_rn(missed, missed));
          top[i] = max(top[i], magnitude(v[i]));
          outliers[i] += code * code > limits[r];
        }
      }
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        if (i >= count) break;
        square_sum[i] = square[i];
        error_sum[i] = error[i];
        if (top[i] > column_absmax[k + i]) atomicMax(&column_absmax[k + i], top[i]);  // the maximum only grows
        if (outliers[i]) atomicAdd(&column_outliers[k + i], outliers[i]);
      }
    }
  }
}
