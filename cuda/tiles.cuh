// Copies tiles of both operands into shared memory, for the products on tensor cores.
#pragma once
#include "outliers.cuh"

constexpr int STAGE_BYTES = (TILE_M + TILE_N) * TILE_K;     // TILE_M rows of activations, then TILE_N of the weight
constexpr int CHUNKS = TILE_K / 16;                         // 16-byte chunks in a row of a tile
constexpr int COPIES = STAGE_BYTES / 16 / THREADS;          // copies per thread and stage

// The offset of 16-byte chunk c of row r in a stage. Each kernel defines the swizzle that its instructions expect.
__device__ __forceinline__ int place_of(int r, int c);

// Starts copying columns k0 and later into a stage; rows and chunks past the end become zeros.
__device__ __forceinline__ void load_stage(uint8_t* stage, int k0, int m0, int n0, const Product& p) {
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int r = (i * THREADS + threadIdx.x) / CHUNKS, c = threadIdx.x % CHUNKS, k = k0 + c * 16;
    const bool is_weight = r >= TILE_M;
    const int row = is_weight ? n0 + r - TILE_M : m0 + r, rows = is_weight ? p.N : p.M;
    const bool present = row < rows && k < p.K;
    const int8_t* from = (is_weight ? p.codes : p.x_codes) + (present ? (int64_t)row * p.K + k : 0);
    copy_async(stage + place_of(r, c), from, present);
  }
}
