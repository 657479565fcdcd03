// Prefill on sm_80 and later: int8 tensor cores (mma.sync), fed by a pipeline of asynchronous copies, with outputs
// finished in registers (outliers.cuh). One launch; the int32 sums are never written to memory.
//
// A block computes a TILE_M x TILE_N tile of y, with STAGES tiles of K in flight. Its warps form a WARPS_M x WARPS_N
// grid.
#include "tiles.cuh"

constexpr int WARPS_M = 2, WARPS_N = THREADS / 64;
constexpr int ROWS = TILE_M / WARPS_M / 16, COLUMNS = TILE_N / WARPS_N / 8;  // fragments per warp
static_assert(TILE_K == 64, "the swizzle below is for rows of 64 bytes");

// The eight rows that ldmatrix reads together are in eight different bank groups.
__device__ __forceinline__ int place_of(int r, int c) { return r * TILE_K + ((c ^ (r >> 1 & 3)) << 4); }

// grid (ceil(N / TILE_N), ceil(M / TILE_M)), THREADS threads, STAGES * STAGE_BYTES shared; K % 16 == 0.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
mixed_matmul(const int8_t* __restrict__ x_codes, const float* __restrict__ x_scale, const int8_t* __restrict__ codes,
             const float* __restrict__ absmax, const FLOAT* __restrict__ bias, const FLOAT* __restrict__ x,
             const int* __restrict__ outliers, const int* __restrict__ count,
             FLOAT* __restrict__ y, int M, int N, int K) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
  const int warp_m = warp / WARPS_N * (ROWS * 16), warp_n = warp % WARPS_N * (COLUMNS * 8);
  const int steps = (K + TILE_K - 1) / TILE_K;

  const Product product = {x_codes, x_scale, codes, absmax, bias, x, outliers, count, y, M, N, K};
  auto load = [&](int step) { load_stage(shared + step % STAGES * STAGE_BYTES, step * TILE_K, m0, n0, product); };

  int sums[ROWS][COLUMNS][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all threads see this stage, and have finished with the previous one
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    commit_copies();
    const uint8_t* const left = shared + step % STAGES * STAGE_BYTES;
    const uint8_t* const right = left + TILE_M * TILE_K;
#pragma unroll
    for (int c = 0; c < CHUNKS; c += 2) {  // 32 values of k
      uint32_t a[ROWS][4], b[COLUMNS][2];
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        load_matrices(a[i], left + place_of(warp_m + i * 16 + (lane & 15), c + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) {
        uint32_t four[4];
        load_matrices(four, right + place_of(warp_n + j * 8 + (lane & 7) + (lane >> 4) * 8, c + (lane >> 3 & 1)));
        b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) mma(sums[i][j], a[i], b[j]);
    }
  }
  finish<ROWS, COLUMNS>(sums, m0, n0, warp_m, warp_n, product, shared);
}
