// Decode: y[M, N] = x[M, K] (codes[N, K] * scale[N])^T + bias for a few tokens, with unquantized activations.
//
// The time is dominated by reading the weight once, so the weight stays in plain row-major order and goes from memory
// straight to registers, 16 bytes per lane. On tensor cores, its rows are the 16-row operand and the tokens are the
// 8-column operand. A sum over k may use any order of k, as long as both operands use the same one: lane t of a quad
// holds 16 adjacent k, for four products. The fallback uses ordinary cores and supports any K, float, and GPUs before
// sm_80. For a rotated weight it reads x as rotate.cu leaves it, in float.
#include "quantize8.cuh"

constexpr int WARPS = THREADS / 32;

#ifdef TENSOR_CORES
constexpr int GROUPS = MAX_TOKENS / 8;  // groups of 8 tokens
constexpr int CHUNK = 64;               // k per load by a whole quad: 4 lanes times 16 bytes
constexpr int LOADS = 4;                // loads in flight per lane and row; a lane reads two rows

// Converts four codes to four FLOATs, exactly.
__device__ __forceinline__ void unpack_codes(uint32_t codes, half, uint32_t (&pairs)[2]) {
  const uint32_t biased = codes ^ 0x80808080u;  // code + 128 in each byte; 0x6400 | b is the half 1024 + b
  pairs[0] = subtract_1152(__byte_perm(biased, 0x64646464u, 0x4140));
  pairs[1] = subtract_1152(__byte_perm(biased, 0x64646464u, 0x4342));
}
__device__ __forceinline__ void unpack_codes(uint32_t codes, bfloat16, uint32_t (&pairs)[2]) {
  const uint32_t biased = codes ^ 0x80808080u;  // 0x4B000000 | b is the float 2^23 + b
  uint32_t wide[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    wide[i] = __float_as_uint(__uint_as_float(__byte_perm(biased, 0x4B000000u, 0x7540 + i)) - 8388736.f);
  pairs[0] = __byte_perm(wide[0], wide[1], 0x7632);  // a code has 8 significant bits, so the upper half is exact
  pairs[1] = __byte_perm(wide[2], wide[3], 0x7632);
}

// grid (ceil(N / 16)), THREADS threads; K % 16 == 0. The warps divide K among them, and add up
// their sums in shared memory in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS)
weight_only_matmul(const FLOAT* __restrict__ x, const int8_t* __restrict__ codes, const float* __restrict__ absmax,
                   const FLOAT* __restrict__ bias, FLOAT* __restrict__ y, int M, int N, int K) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
  const int n0 = blockIdx.x * 16;
  const int8_t* rows[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) rows[h] = codes + (int64_t)min(n0 + group + 8 * h, N - 1) * K;
  float sums[GROUPS][4] = {};

  for (int start = warp * CHUNK * LOADS; start < K; start += WARPS * CHUNK * LOADS) {
    uint4 loaded[LOADS][2];
#pragma unroll
    for (int u = 0; u < LOADS; ++u)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = start + u * CHUNK + quad * 16;
        loaded[u][h] = {0, 0, 0, 0};
        if (k < K) loaded[u][h] = __ldcs(reinterpret_cast<const uint4*>(rows[h] + k));
      }
#pragma unroll
    for (int u = 0; u < LOADS; ++u) {
      const int k = start + u * CHUNK + quad * 16;
      uint32_t tokens[GROUPS][8];
#pragma unroll
      for (int m = 0; m < GROUPS; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint4 pairs = {0, 0, 0, 0};
          const int token = m * 8 + group;
          if (token < M && k < K) pairs = *reinterpret_cast<const uint4*>(x + (int64_t)token * K + k + h * 8);
          tokens[m][4 * h] = pairs.x, tokens[m][4 * h + 1] = pairs.y;
          tokens[m][4 * h + 2] = pairs.z, tokens[m][4 * h + 3] = pairs.w;
        }
      const uint32_t low[4] = {loaded[u][0].x, loaded[u][0].y, loaded[u][0].z, loaded[u][0].w};
      const uint32_t high[4] = {loaded[u][1].x, loaded[u][1].y, loaded[u][1].z, loaded[u][1].w};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t top[2], bottom[2];
        unpack_codes(low[s], FLOAT{}, top);
        unpack_codes(high[s], FLOAT{}, bottom);
        const uint32_t a[4] = {top[0], bottom[0], top[1], bottom[1]};
#pragma unroll
        for (int m = 0; m < GROUPS; ++m) {
          const uint32_t b[2] = {tokens[m][2 * s], tokens[m][2 * s + 1]};
          mma<FLOAT>(sums[m], a, b);
        }
      }
    }
  }

  __shared__ float partial[WARPS][GROUPS][16][9];  // [row][token]; 9 keeps columns in different banks
#pragma unroll
  for (int m = 0; m < GROUPS; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][m][group + 8 * (i >> 1)][2 * quad + (i & 1)] = sums[m][i];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * MAX_TOKENS; i += THREADS) {
    const int row = i & 15, token = i >> 4, n = n0 + row;
    if (token >= M || n >= N) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[w][token >> 3][row][token & 7];
    sum = __fmul_rn(sum, scale_of(absmax[n]));
    if (bias) sum = __fadd_rn(sum, to_float(bias[n]));
    y[(int64_t)token * N + n] = from_float<FLOAT>(sum);
  }
}
#else
#if ROTATED
using Input = float;
#else
using Input = FLOAT;
#endif

// grid (ceil(N / WARPS)), THREADS threads. One warp per row of the weight, for up to MAX_TOKENS tokens.
extern "C" __global__ void __launch_bounds__(THREADS)
weight_only_matmul(const Input* __restrict__ x, const int8_t* __restrict__ codes, const float* __restrict__ absmax,
                   const FLOAT* __restrict__ bias, FLOAT* __restrict__ y, int M, int N, int K) {
  const int lane = threadIdx.x & 31, n = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (n >= N) return;
  float sums[MAX_TOKENS] = {};
  for (int k = lane * VECTOR; k < K; k += 32 * VECTOR) {
    float q[VECTOR];
    if (ALIGNED) {
      const uint2 words = *reinterpret_cast<const uint2*>(codes + (int64_t)n * K + k);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) q[i] = (float)(int8_t)((i < 4 ? words.x : words.y) >> 8 * (i & 3));
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) q[i] = k + i < K ? (float)codes[(int64_t)n * K + k + i] : 0.f;
    }
#pragma unroll
    for (int m = 0; m < MAX_TOKENS; ++m) {
      if (m >= M) break;
      float v[VECTOR];
      load_vector(x + (int64_t)m * K + k, K - k, v);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[m] = __fmaf_rn(v[i], q[i], sums[m]);
    }
  }
  const float scale = scale_of(absmax[n]), shift = bias ? to_float(bias[n]) : 0.f;
#pragma unroll
  for (int m = 0; m < MAX_TOKENS; ++m) {
    if (m >= M) break;
    const float sum = warp_sum(sums[m]);
    if (lane == 0) y[(int64_t)m * N + n] = from_float<FLOAT>(__fadd_rn(__fmul_rn(sum, scale), shift));
  }
}
#endif
