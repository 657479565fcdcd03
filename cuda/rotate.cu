// Rotates activations for the decode product, which multiplies them unquantized: float [M, K], so that rounding to the
// 16-bit type does not add to the error.
#include "rotate.cuh"

// grid (tokens), THREADS threads. columns is a multiple of ROTATION.
extern "C" __global__ void __launch_bounds__(THREADS)
rotate(const FLOAT* __restrict__ x, float* __restrict__ rotated, int columns) {
  const int64_t row = (int64_t)blockIdx.x * columns;
  const int lane = threadIdx.x & 31;
  // lanes past the end take part, because all lanes of a warp exchange elements
  for (int k = threadIdx.x * VECTOR; k - lane * VECTOR < columns; k += THREADS * VECTOR) {
    float v[VECTOR] = {};
    if (k < columns) load_vector(x + row + k, VECTOR, v);
    rotate_vector(v);
    if (k >= columns) continue;
    *reinterpret_cast<float4*>(rotated + row + k) = {v[0], v[1], v[2], v[3]};
    *reinterpret_cast<float4*>(rotated + row + k + 4) = {v[4], v[5], v[6], v[7]};
  }
}
