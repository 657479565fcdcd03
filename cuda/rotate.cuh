// The block Hadamard rotation of quantize8/kernels/reference.py, bit for bit, in the registers of a warp.
//
// A lane holds VECTOR adjacent elements and a warp 256, so a block of 256, 64 or 16 is within a warp and needs no shared
// memory. Stages below VECTOR are within a lane, and further ones between two lanes. The host defines ROTATION, the size
// of a block, and ROTATION_ROOT, its square root.
#pragma once
#include "quantize8.cuh"

static_assert(32 * VECTOR % ROTATION == 0, "a block is within a warp");

// Rotates the elements that the lanes of a warp hold. All lanes must call it.
__device__ __forceinline__ void rotate_vector(float (&v)[VECTOR]) {
#pragma unroll
  for (int h = 1; h < VECTOR; h <<= 1)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (i & h) continue;
      const float a = v[i], b = v[i + h];
      v[i] = __fadd_rn(a, b);
      v[i + h] = __fadd_rn(a, -b);
    }
#pragma unroll
  for (int h = 1; h < ROTATION / VECTOR; h <<= 1) {
    const bool is_second = threadIdx.x & h;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float other = __shfl_xor_sync(ALL_LANES, v[i], h);
      v[i] = __fadd_rn(other, is_second ? -v[i] : v[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) v[i] = __fmul_rn(v[i], 1.f / ROTATION_ROOT);
}
