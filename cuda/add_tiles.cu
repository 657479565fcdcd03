// Adds up the column sums that quantize_rowwise.cu computes per tile of rows: over the tiles in order, in double
// precision.
#include "quantize8.cuh"

// grid (ceil(columns / THREADS)). Adds float [tiles, columns] to double [columns], one tile after another.
extern "C" __global__ void __launch_bounds__(THREADS)
add_tiles(const float* __restrict__ tile_square, const float* __restrict__ tile_error, double* sum_square,
          double* sum_error, int tiles, int columns) {
  const int k = blockIdx.x * THREADS + threadIdx.x;
  if (k >= columns) return;
  double square = sum_square[k], error = sum_error[k];
#pragma unroll 8
  for (int tile = 0; tile < tiles; ++tile) {
    square += tile_square[(int64_t)tile * columns + k];
    error += tile_error[(int64_t)tile * columns + k];
  }
  sum_square[k] = square;
  sum_error[k] = error;
}
