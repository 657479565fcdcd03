// The second half of the mixed product: turns int32 sums into outputs, and adds what int8 missed of outlier columns.
//
//   y = (sums * scale_x + residual w_outlier^T) * scale_w + bias,    residual = x - code * scale_x
//
// The outlier list is on the device (quantize_activations), so its length is read here. Any number of columns works,
// and an empty list costs one load. Sums are m16n8 fragments of mma.sync, a layout that wgmma's accumulators share.
#pragma once
#include "quantize8.cuh"

struct Product {  // the operands of a product kernel
  const int8_t* x_codes;      // [M, K]
  const float* x_scale;       // [M]
  const int8_t* codes;        // [N, K]
  const float* absmax;        // [N]
  const FLOAT* bias;          // [N] or null
  const FLOAT* x;             // [M, K]
  const int* outliers;        // columns in ascending order
  const int* count;           // number of outlier columns; null: none
  FLOAT* y;                   // [M, N]
  int M, N, K;
};

// What int8 missed of element (m, k): the whole value where the code was set to 0.
__device__ __forceinline__ float residual_of(const Product& p, int m, int k) {
  const int64_t at = (int64_t)m * p.K + k;
  const float value = to_float(p.x[at]);
  return __fsub_rn(value, __fmul_rn((float)p.x_codes[at], p.x_scale[m]));
}

#ifdef TENSOR_CORES
constexpr int OUTLIERS_AT_ONCE = 16;  // values of k in one 16-bit product
constexpr int OUTLIER_STRIDE = 24;    // elements from row to row; puts the fragments of a warp in different banks

__device__ __forceinline__ uint32_t pack(float low, float high) {
  return from_float<FLOAT>(low).bits | (uint32_t)from_float<FLOAT>(high).bits << 16;
}
__device__ __forceinline__ uint32_t pair_at(const FLOAT* p) { return *reinterpret_cast<const uint32_t*>(p); }

// Finishes a warp's ROWS x COLUMNS fragments, whose first output is y[m0 + warp_m, n0 + warp_n]; the tile of the block
// begins at y[m0, n0]. All warps of the block must call this, and must no longer need `shared`, of which
// (TILE_M + TILE_N) * OUTLIER_STRIDE elements are overwritten.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void finish(const int (&sums)[ROWS][COLUMNS][4], int m0, int n0, int warp_m, int warp_n,
                                       const Product& p, uint8_t* shared) {
  const int lane = threadIdx.x & 31, group = lane >> 2, quad = lane & 3;
  float values[ROWS][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int m = m0 + warp_m + i * 16 + group + 8 * (e >> 1);
      const float scale = m < p.M ? p.x_scale[m] : 0.f;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) values[i][j][e] = __fmul_rn((float)sums[i][j][e], scale);
    }

  const int count = p.count ? *p.count : 0;
  FLOAT* const gathered = reinterpret_cast<FLOAT*>(shared);  // residuals [TILE_M], then weights [TILE_N]
  for (int first = 0; first < count; first += OUTLIERS_AT_ONCE) {
    __syncthreads();  // no thread reads shared memory any more
    for (int i = threadIdx.x; i < (TILE_M + TILE_N) * OUTLIERS_AT_ONCE; i += THREADS) {
      const int r = i / OUTLIERS_AT_ONCE, at = first + i % OUTLIERS_AT_ONCE, m = m0 + r, n = n0 + r - TILE_M;
      float value = 0.f;
      if (at < count) {
        const int k = p.outliers[at];
        if (r < TILE_M) value = m < p.M ? residual_of(p, m, k) : 0.f;
        else value = n < p.N ? (float)p.codes[(int64_t)n * p.K + k] : 0.f;
      }
      gathered[r * OUTLIER_STRIDE + i % OUTLIERS_AT_ONCE] = from_float<FLOAT>(value);
    }
    __syncthreads();
    uint32_t a[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[i][e] = pair_at(gathered + (warp_m + i * 16 + group + 8 * (e & 1)) * OUTLIER_STRIDE + 2 * quad + 8 * (e >> 1));
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const FLOAT* const weights = gathered + (TILE_M + warp_n + j * 8 + group) * OUTLIER_STRIDE + 2 * quad;
      const uint32_t b[2] = {pair_at(weights), pair_at(weights + 8)};
#pragma unroll
      for (int i = 0; i < ROWS; ++i) mma<FLOAT>(values[i][j], a[i], b);
    }
  }

  const bool pairs = p.N % 2 == 0;  // two neighboring outputs share an aligned word
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) {
    const int n = n0 + warp_n + j * 8 + 2 * quad;
    if (n >= p.N) continue;
    const int next = min(n + 1, p.N - 1);
    const float scale[2] = {scale_of(p.absmax[n]), scale_of(p.absmax[next])};
    const float shift[2] = {p.bias ? to_float(p.bias[n]) : 0.f, p.bias ? to_float(p.bias[next]) : 0.f};
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = m0 + warp_m + i * 16 + group + 8 * h;
        if (m >= p.M) continue;
        FLOAT* const y = p.y + (int64_t)m * p.N + n;
        const float low = __fmaf_rn(values[i][j][2 * h], scale[0], shift[0]);
        const float high = __fmaf_rn(values[i][j][2 * h + 1], scale[1], shift[1]);
        if (pairs) {
          *reinterpret_cast<uint32_t*>(y) = pack(low, high);
        } else {
          y[0] = from_float<FLOAT>(low);
          if (n + 1 < p.N) y[1] = from_float<FLOAT>(high);
        }
      }
  }
}
#endif
