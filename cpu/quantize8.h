/* The CPU kernels of quantize8: definitions shared by all files.
 *
 * All sources are compiled once per unit (the int8 instructions of a processor), into one library per unit.
 * quantize8/kernels/cpu.py loads the library of the best unit that the processor has. Outside multiply.h and vectors.h,
 * the code depends on the unit only through macros that these define.
 *
 * Shapes: M tokens, N out features, K in features. A weight is packed in blocks of 32 out features and steps of 64 in
 * features, so that every unit reads it in memory order:
 *
 *     weight [N / 32][K / 64][2 halves][16 groups of 4 in features][16 out features][4]      int8, zeros at the edges
 *
 * Activations are packed for each call, in tiles of TILE_M tokens: [M / TILE_M][K / 64][TILE_M][64], of code_t.
 * quantize8/kernels/reference.py defines the arithmetic. Compile with -ffp-contract=off: fused operations are written
 * explicitly (fma_), and everything else rounds after each step, as the definition does.
 */
#ifndef QUANTIZE8_H
#define QUANTIZE8_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

#define STEP_K 64                      /* in features per step: a row of an AMX tile, in bytes */
#define GROUP_K 4                      /* in features multiplied in one 32-bit lane */
#define BLOCK_N 32                     /* out features per block: two AMX tiles */
#define HALF_BLOCK 1024                /* bytes of half a block per step */
#define STEP_BYTES (2 * HALF_BLOCK)    /* bytes of a block per step */
#define DIGIT_BASE 254                 /* twice the largest code, so that the rounding remainder is a code again */
#define INT8_MAX_CODE 127
#define INFINITY_BITS 0x7F800000u           /* of float32; magnitudes sort in the same order as their bits */
#define MAGNITUDE 0x7FFFFFFFu
#define ROUNDER 12582912.0f            /* 1.5 * 2^23: adding it rounds half to even; the integer is in the low bits */

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t magnitude_of(float value) { return as_bits(value) & MAGNITUDE; }

INLINE float float_of_half(uint16_t half) {
  uint32_t exponent = half & 0x7C00u, sign = (uint32_t)(half & 0x8000u) << 16;
  uint32_t normal = ((uint32_t)(half & 0x7FFFu) << 13) + (exponent == 0x7C00u ? 0x70000000u : 0x38000000u);
  uint32_t subnormal = as_bits((float)(half & 0x3FFu) * 0x1p-24f);
  return as_float((exponent ? normal : subnormal) | sign);
}

/* Rounds a float32 to float16, half to even, and returns it as float32. Infinite from 65520 on; NaN stays NaN. */
INLINE float round_to_half(float value) {
  uint32_t bits = as_bits(value), sign = bits & 0x80000000u, magnitude = bits & MAGNITUDE;
  uint32_t normal = (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u)) & ~0x1FFFu;
  uint32_t subnormal = as_bits((as_float(magnitude) + 0.5f) - 0.5f); /* rounds to a multiple of 2^-24 */
  uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
  rounded = magnitude >= 0x477FF000u ? INFINITY_BITS : rounded;
  rounded = magnitude > INFINITY_BITS ? magnitude : rounded;
  return as_float(rounded | sign);
}

/* The float16 bits of a float32 whose value float16 can represent. */
INLINE uint16_t half_bits(float value) {
  uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & MAGNITUDE;
  uint32_t normal = (magnitude - 0x38000000u) >> 13, subnormal = (uint32_t)(int32_t)(as_float(magnitude) * 0x1p24f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude == INFINITY_BITS ? 0x7C00u : half;
  half = magnitude > INFINITY_BITS ? 0x7E00u : half;
  return (uint16_t)(half | sign);
}

/* Reads [count] stored values as float32: into `values`, or in place if they are float32 already. */
INLINE const float *read_row(enum dtype dtype, const void *stored, int64_t count, float *values) {
  if (dtype == FLOAT32) return stored;
  const uint16_t *bits = stored;
  if (dtype == BFLOAT16) {
    for (int64_t k = 0; k < count; k++) values[k] = as_float((uint32_t)bits[k] << 16);
    return values;
  }
  int64_t k = 0;
#if defined(__F16C__)
  for (; k + 8 <= count; k += 8)
    _mm256_storeu_ps(values + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(bits + k))));
#elif defined(__ARM_NEON)
  for (; k + 4 <= count; k += 4) vst1q_f32(values + k, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits + k))));
#endif
  for (; k < count; k++) values[k] = float_of_half(bits[k]);
  return values;
}

INLINE const void *row_of(enum dtype dtype, const void *stored, int64_t row, int64_t columns) {
  return (const char *)stored + row * columns * (dtype == FLOAT32 ? 4 : 2);
}

INLINE uint32_t largest_magnitude(const float *values, int64_t count) {
  int32_t peak = 0;
  for (int64_t k = 0; k < count; k++) {
    int32_t magnitude = (int32_t)magnitude_of(values[k]);
    peak = magnitude > peak ? magnitude : peak;
  }
  return (uint32_t)peak;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Runs work(context, item) for every item below count, on up to `threads` threads. */
void run_parallel(int64_t count, int threads, void (*work)(void *context, int64_t item), void *context);

#endif
