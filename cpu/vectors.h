/* Vectors as long as the unit's registers, with LANES float32 or int32 numbers, and operations that C lacks. */
#ifndef VECTORS_H
#define VECTORS_H
#include "multiply.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK_VECTORS (BLOCK_N / LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

INLINE floats load_floats(const float *place) {
  floats values;
  memcpy(&values, place, sizeof values);
  return values;
}
INLINE ints load_ints(const void *place) {
  ints values;
  memcpy(&values, place, sizeof values);
  return values;
}
INLINE floats to_floats(ints values) { return __builtin_convertvector(values, floats); }

INLINE ints larger(ints a, ints b) {
  ints first = a > b;
  return (a & first) | (b & ~first);
}

/* a * b + c, rounded only once where the processor supports it. */
INLINE floats fma_(floats a, floats b, floats c) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

/* Lane i of the result is lane i ^ distance, a power of two below LANES. */
INLINE floats swapped(floats values, int distance) {
#if defined(__AVX512F__)
  switch (distance) {
    case 1: return (floats)_mm512_permute_ps((__m512)values, 0xB1);
    case 2: return (floats)_mm512_permute_ps((__m512)values, 0x4E);
    case 4: return (floats)_mm512_shuffle_f32x4((__m512)values, (__m512)values, 0xB1);
    default: return (floats)_mm512_shuffle_f32x4((__m512)values, (__m512)values, 0x4E);
  }
#elif defined(__AVX2__)
  switch (distance) {
    case 1: return (floats)_mm256_permute_ps((__m256)values, 0xB1);
    case 2: return (floats)_mm256_permute_ps((__m256)values, 0x4E);
    default: return (floats)_mm256_permute2f128_ps((__m256)values, (__m256)values, 1);
  }
#elif defined(__ARM_NEON)
  return (floats)(distance == 1 ? vrev64q_f32((float32x4_t)values)
                                : vextq_f32((float32x4_t)values, (float32x4_t)values, 2));
#else
  return distance == 1 ? (floats){values[1], values[0], values[3], values[2]}
                       : (floats){values[2], values[3], values[0], values[1]};
#endif
}

/* In each lane: total += the dot product of the four bytes of `factors`, 0 to 127, and four signed bytes of `words`. */
INLINE ints add_dots(ints total, int32_t factors, ints words) {
#if defined(UNIT_AMX) || defined(UNIT_AVX512VNNI)
  return (ints)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32(factors), (__m512i)words);
#elif defined(UNIT_AVXVNNI)
  return (ints)_mm256_dpbusd_avx_epi32((__m256i)total, _mm256_set1_epi32(factors), (__m256i)words);
#elif defined(UNIT_AVX2) /* at most one of the four factors is not 0, so nothing saturates */
  __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(factors), (__m256i)words);
  return total + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(UNIT_NEON_DOTPROD) || defined(UNIT_NEON_I8MM)
  return (ints)vdotq_s32((int32x4_t)total, vreinterpretq_s8_s32(vdupq_n_s32(factors)), (int8x16_t)words);
#else
  for (int byte = 0; byte < 4; byte++) total += ((words << (24 - 8 * byte)) >> 24) * (factors >> 8 * byte & 127);
  return total;
#endif
}

INLINE shorts to_bfloat16(floats values) {
#if defined(__AVX512F__) /* the same in fewer instructions than gcc generates */
  __m512i number = (__m512i)values, half = _mm512_srli_epi32(number, 16);
  __m512i up = _mm512_add_epi32(_mm512_and_si512(half, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)values, (__m512)values, _CMP_UNORD_Q);
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(number, up), 16);
  return (shorts)_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7FC0)));
#else
  ints bits = (ints)values, number = values == values;
  ints rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF;
  return __builtin_convertvector((rounded & number) | (0x7FC0 & ~number), shorts);
#endif
}

INLINE shorts to_float16(floats values) {
#if defined(__AVX512F__)
  return (shorts)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (shorts)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#else
  shorts halves;
  for (int i = 0; i < LANES; i++) halves[i] = half_bits(round_to_half(values[i]));
  return halves;
#endif
}

/* Stores the first `width` of 32 numbers as float32, bfloat16 or float16, rounded half to even. */
INLINE void store_block(const floats *values, enum dtype dtype, void *out, int width) {
  char room[4 * BLOCK_N], *to = width == BLOCK_N ? out : room;
  int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  for (int v = 0; v < BLOCK_VECTORS; v++, to += LANES * bytes) {
    shorts narrow;
    if (dtype == FLOAT32) memcpy(to, &values[v], sizeof values[v]);
    else if (dtype == BFLOAT16) narrow = to_bfloat16(values[v]), memcpy(to, &narrow, sizeof narrow);
    else narrow = to_float16(values[v]), memcpy(to, &narrow, sizeof narrow);
  }
  if (width < BLOCK_N) memcpy(out, room, (size_t)(width * bytes));
}

#endif
