// Dequantizes codes and absmax: code * (absmax / 127), rounded once to float and once to FLOAT.
#include "quantize8.cuh"

// grid (rows), THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS)
dequantize(const int8_t* __restrict__ codes, const float* __restrict__ absmax, FLOAT* __restrict__ weight, int columns) {
  const int64_t row = blockIdx.x;
  const float scale = scale_of(absmax[row]);
  for (int k = threadIdx.x; k < columns; k += THREADS)
    weight[row * columns + k] = from_float<FLOAT>(__fmul_rn((float)codes[row * columns + k], scale));
}
