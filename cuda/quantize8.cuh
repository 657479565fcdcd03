// Shared by all kernels: number types, loads, the formula for codes, and a function for each PTX instruction used.
//
// No CUDA header is needed, so NVRTC can compile this wherever CuPy is installed. The host passes these definitions as
// compiler options: FLOAT (half, bfloat16 or float), ALIGNED, INT8_MAX, and each kernel's own sizes. tests/cuda_on_cpu
// builds the same files with g++, where emulator.h replaces the hardware. Where a result must equal the reference bit
// for bit, float products and sums are written as __fmul_rn and __fadd_rn, so that no compiler fuses them.
#pragma once
#ifdef QUANTIZE8_EMULATOR
#include "emulator.h"
#else
#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

struct half { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
__device__ __forceinline__ float to_float(half x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
// Rounded to the nearest, ties to even.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) {
  half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
#if __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}
// Subtracts 1152 (0x6480) from each of the two halves in a word.
__device__ __forceinline__ uint32_t subtract_1152(uint32_t pair) {
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0x64806480u));
  return result;
}

#if __CUDA_ARCH__ >= 800
// Tensor cores: sums [16, 8] += int8 [16, 32] times int8 [8, 32] transposed.
__device__ __forceinline__ void mma(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for 16-bit floats: [16, 16] times [8, 16] transposed, summed in float.
template <class T> __device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define MMA_16BIT(T, NAME)                                                                                             \
  template <> __device__ __forceinline__ void mma<T>(float(&sums)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "          \
        "{%0,%1,%2,%3};"                                                                                               \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                           \
  }
MMA_16BIT(half, "f16")
MMA_16BIT(bfloat16, "bf16")

// Loads four matrices of 8 rows of 16 bytes from shared memory into mma fragments; each lane passes one row.
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}
// Starts copying 16 bytes, or zeros, from global to shared memory; they are there after wait_copies.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif
#endif  // QUANTIZE8_EMULATOR

constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr uint32_t MAGNITUDE = 0x7fffffffu;  // of float bits: masked, they sort like magnitudes, NaN above infinity
constexpr uint32_t INFINITE = 0x7f800000u;
static_assert(VECTOR == 8, "16 bytes of 16-bit numbers");  // adjacent elements that a thread processes at a time

// Float bits of |x|.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & MAGNITUDE; }

// Elements p[0..7] as floats; elements from `count` on are 0. ALIGNED: the row length is a multiple of 8, so that every
// vector is complete and aligned to its size.
__device__ __forceinline__ void unpack_word(uint32_t word, half, float (&two)[2]) {
  two[0] = to_float(half{(uint16_t)word});
  two[1] = to_float(half{(uint16_t)(word >> 16)});
}
__device__ __forceinline__ void unpack_word(uint32_t word, bfloat16, float (&two)[2]) {
  two[0] = __uint_as_float(word << 16);
  two[1] = __uint_as_float(word & 0xffff0000u);
}
template <class T> __device__ __forceinline__ void load_vector(const T* p, int count, float (&v)[VECTOR]) {
  if (ALIGNED) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    const uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float two[2];
      unpack_word(four[i], T{}, two);
      v[2 * i] = two[0];
      v[2 * i + 1] = two[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) v[i] = i < count ? to_float(p[i]) : 0.f;
  }
}
__device__ __forceinline__ void load_vector(const float* p, int count, float (&v)[VECTOR]) {
  if (ALIGNED) {
    const float4 low = *reinterpret_cast<const float4*>(p), high = *reinterpret_cast<const float4*>(p + 4);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) v[i] = i < count ? p[i] : 0.f;
  }
}
__device__ __forceinline__ void store_codes(int8_t* p, int count, const int8_t (&codes)[VECTOR]) {
  if (ALIGNED) {
    uint2 words = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words.x |= (uint32_t)(uint8_t)codes[i] << 8 * i;
      words.y |= (uint32_t)(uint8_t)codes[4 + i] << 8 * i;
    }
    *reinterpret_cast<uint2*>(p) = words;
  } else {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      if (i < count) p[i] = codes[i];
  }
}

// The formula for codes (quantize8/kernels/reference.py): each step rounds to float. If a row's absmax is 0, tiny, infinite
// or NaN, the inverse is 0, and so are the codes: infinity * 0 is NaN, and NaN converts to 0.
__device__ __forceinline__ float inverse_of(uint32_t peak) {
  const float inverse = __fmul_rn(__fdiv_rn(1.f, __uint_as_float(peak)), (float)INT8_MAX);
  return magnitude(inverse) >= INFINITE ? 0.f : inverse;
}
__device__ __forceinline__ int8_t code_of(float x, float inverse) {
  return (int8_t)__float2int_rn(__fmul_rn(x, inverse));
}
__device__ __forceinline__ float scale_of(float absmax) { return __fdiv_rn(absmax, (float)INT8_MAX); }

// Reductions over a warp, with the result in every lane. The order is fixed, however the warps are scheduled.
template <class T> __device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = max(x, __shfl_xor_sync(ALL_LANES, x, d));
  return x;
}
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(ALL_LANES, x, d);
  return x;
}
