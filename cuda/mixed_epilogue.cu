// The epilogue of the mixed product where a library computed the int32 sums (GPUs before sm_80, float activations, or K
// not a multiple of 16). One thread per output.
#include "outliers.cuh"

// grid (M * ceil(N / THREADS)), THREADS threads. sums [M, stride], of which the first N columns are used.
extern "C" __global__ void __launch_bounds__(THREADS)
mixed_epilogue(const int* __restrict__ sums, const int8_t* __restrict__ x_codes, const float* __restrict__ x_scale,
               const int8_t* __restrict__ codes, const float* __restrict__ absmax, const FLOAT* __restrict__ bias,
               const FLOAT* __restrict__ x, const int* __restrict__ outliers, const int* __restrict__ count,
               FLOAT* __restrict__ y, int M, int N, int K, int stride) {
  const Product p = {x_codes, x_scale, codes, absmax, bias, x, outliers, count, y, M, N, K};
  const int row_blocks = (N + THREADS - 1) / THREADS, m = blockIdx.x / row_blocks;
  const int n = (blockIdx.x - m * row_blocks) * THREADS + threadIdx.x;
  if (n >= N) return;
  float value = __fmul_rn((float)sums[(int64_t)m * stride + n], x_scale[m]);
  const int columns = count ? *count : 0;
  for (int i = 0; i < columns; ++i)
    value = __fmaf_rn(residual_of(p, m, outliers[i]), (float)codes[(int64_t)n * K + outliers[i]], value);
  value = __fmul_rn(value, scale_of(absmax[n]));
  y[(int64_t)m * N + n] = from_float<FLOAT>(bias ? __fadd_rn(value, to_float(bias[n])) : value);
}
