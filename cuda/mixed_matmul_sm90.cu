// Prefill on Hopper (sm_90a): like mixed_matmul.cu, but with warpgroup matrix instructions (wgmma), which read both
// operands from shared memory. There a row of a tile has 128 bytes, in the 128-byte swizzle. The tile is 128 x 256: two
// warpgroups of 64 rows each, with 128 sums per thread.
#include "tiles.cuh"

#ifndef QUANTIZE8_EMULATOR
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Makes what the copies wrote to shared memory visible to the tensor cores, which read it through another proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// sums[128] += int8 [64, 32] times int8 [256, 32] transposed.
#define TEN(p) "%" p "0,%" p "1,%" p "2,%" p "3,%" p "4,%" p "5,%" p "6,%" p "7,%" p "8,%" p "9,"
#define FOUR(i) "+r"(sums[i]), "+r"(sums[(i) + 1]), "+r"(sums[(i) + 2]), "+r"(sums[(i) + 3])
#define SIXTEEN(i) FOUR(i), FOUR((i) + 4), FOUR((i) + 8), FOUR((i) + 12)
__device__ __forceinline__ void warpgroup_mma(int (&sums)[128], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") TEN("6") TEN("7")
               TEN("8") TEN("9") TEN("10") TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, 1;"
               : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)
               : "l"(a), "l"(b));
}
#endif

static_assert(TILE_M == 128 && TILE_N == 256 && TILE_K == 128 && THREADS == 256, "what wgmma m64n256 is laid out for");

// The 128-byte swizzle.
__device__ __forceinline__ int place_of(int r, int c) { return r * TILE_K + ((c ^ (r & 7)) << 4); }

// Descriptor of an operand with 128-byte rows: groups of 8 rows are 1024 bytes apart (PTX ISA, matrix descriptor of
// wgmma).
__device__ __forceinline__ uint64_t describe(const void* p) {
  return (uint64_t)((shared_address(p) & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

// grid (ceil(N / TILE_N), ceil(M / TILE_M)), THREADS threads, STAGES * STAGE_BYTES shared; K % 16 == 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
mixed_matmul(const int8_t* __restrict__ x_codes, const float* __restrict__ x_scale, const int8_t* __restrict__ codes,
             const float* __restrict__ absmax, const FLOAT* __restrict__ bias, const FLOAT* __restrict__ x,
             const int* __restrict__ outliers, const int* __restrict__ count,
             FLOAT* __restrict__ y, int M, int N, int K) {
  DYNAMIC_SHARED(shared);
  const int warpgroup = threadIdx.x >> 7, warp = threadIdx.x >> 5 & 3;
  const int m0 = blockIdx.y * TILE_M, n0 = blockIdx.x * TILE_N;
  const int steps = (K + TILE_K - 1) / TILE_K;

  const Product product = {x_codes, x_scale, codes, absmax, bias, x, outliers, count, y, M, N, K};
  auto load = [&](int step) { load_stage(shared + step % STAGES * STAGE_BYTES, step * TILE_K, m0, n0, product); };

  int sums[1][TILE_N / 8][4];
  int(&flat)[TILE_N / 2] = reinterpret_cast<int(&)[TILE_N / 2]>(sums);
#pragma unroll
  for (int i = 0; i < TILE_N / 2; ++i) flat[i] = 0;
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    fence_async_proxy();
    __syncthreads();  // all threads see this stage, and have finished with the previous one
    const uint8_t* const left = shared + step % STAGES * STAGE_BYTES + warpgroup * 64 * TILE_K;
    const uint8_t* const right = shared + step % STAGES * STAGE_BYTES + TILE_M * TILE_K;
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < TILE_K; k += 32) warpgroup_mma(flat, describe(left + k), describe(right + k));
    warpgroup_commit();
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    commit_copies();
    warpgroup_wait();
  }
  finish<1, TILE_N / 8>(sums, m0, n0, warpgroup * 64 + warp * 16, 0, product, shared);
}
