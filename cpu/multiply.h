/* The int8 units: activations times one block of a weight, with exact int32 sums. One section per unit.
 *
 *     multiply(block, left, rows, steps, code_sums, sums, ahead)
 *
 * computes sums int32 [rows, 32] = left times block over `steps` steps.
 *
 *     left       packed activations: codes plus SHIFT
 *     rows       at most ROWS
 *     code_sums  int32 [32], the sum of each out feature's codes, for units whose sums start at -SHIFT times that
 *     sums       must have room for whole tiles of TILE_M rows
 *     ahead      whether to prefetch the weight from memory well ahead of its use
 *
 * Intermediate sums may wrap around; the final sums are exact as long as 127^2 K < 2^31.
 *
 * DIGITS: whether decode multiplies a token as several int8 digits (see linear.c), or in float32 with multiply_float,
 * which is faster where a unit has no byte products.
 */
#ifndef MULTIPLY_H
#define MULTIPLY_H
#include "quantize8.h"

#define TO_TILE(left, row, steps) ((left) + (int64_t)(row) * (steps) * STEP_K) /* row: a multiple of TILE_M */

/* Prefetches further ahead than the processor's own prefetcher, which stops at the end of a page. */
INLINE void fetch_ahead(const int8_t *place) {
  for (int line = 0; line < STEP_BYTES / 64; line++) __builtin_prefetch(place + 2 * STEP_BYTES + line * 64, 0, 2);
}

#if defined(UNIT_AMX) || defined(UNIT_AVX512VNNI) || defined(UNIT_AVXVNNI) || defined(UNIT_AVX2)
#include <immintrin.h>

INLINE int32_t group_at(const void *place) { /* reads four codes */
  int32_t group;
  memcpy(&group, place, 4);
  return group;
}
#endif

/* Without this, gcc reorders additions over many steps and runs out of registers. */
#if defined(__AVX2__)
#define KEEP(sum) __asm__("" : "+x"(sum))
#else
#define KEEP(sum) (void)0
#endif

#if defined(UNIT_AMX) /* ---------------- Intel AMX: tiles of 16 rows by 64 bytes ---------------- */

typedef int8_t code_t;
#define SHIFT 0
#define TILE_M 16
#define ROWS 32
#define DIGITS 1

INLINE void prepare_unit(void) {
  static const uint8_t shape[64] = {1, [16] = 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
                                    [48] = 16, 16, 16, 16, 16, 16, 16, 16};
  _tile_loadconfig(shape);
}
INLINE void release_unit(void) { _tile_release(); }

INLINE void multiply_tiles(const int8_t *block, const code_t *left, int tiles, int64_t steps, int32_t *sums,
                           int ahead) {
  const code_t *second = left + steps * TILE_M * STEP_K;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++, block += STEP_BYTES, left += TILE_M * STEP_K, second += TILE_M * STEP_K) {
    if (ahead) fetch_ahead(block);
    _tile_loadd(6, block, 64);
    _tile_loadd(7, block + HALF_BLOCK, 64);
    _tile_loadd(4, left, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (tiles == 1) continue;
    _tile_loadd(5, second, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, 4 * BLOCK_N);
  _tile_stored(1, sums + 16, 4 * BLOCK_N);
  if (tiles == 1) return;
  _tile_stored(2, sums + 16 * BLOCK_N, 4 * BLOCK_N);
  _tile_stored(3, sums + 16 * BLOCK_N + 16, 4 * BLOCK_N);
}

static void multiply(const int8_t *block, const code_t *left, int rows, int64_t steps, const int32_t *code_sums,
                     int32_t *sums, int ahead) {
  (void)code_sums;
  if (rows <= TILE_M) multiply_tiles(block, left, 1, steps, sums, ahead);
  else if (ahead) multiply_tiles(block, left, 2, steps, sums, 1);
  else multiply_tiles(block, left, 2, steps, sums, 0);
}

#elif defined(UNIT_AVX512VNNI) /* ------------ unsigned times signed bytes, 16 out features per vector ------------ */

typedef uint8_t code_t;
#define SHIFT 128 /* 2^7 */
#define TILE_M 8
#define ROWS 32
#define DIGITS 1

/* `tile` is a compile-time constant where it matters: 8 rows by 32 outputs fit in 16 of the 32 registers. */
INLINE void multiply_tile(const int8_t *block, const code_t *left, int tile, int64_t steps, const int32_t *code_sums,
                          int32_t *sums, int ahead) {
  __m512i total[TILE_M][2];
  for (int i = 0; i < tile; i++)
    for (int h = 0; h < 2; h++) total[i][h] = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(code_sums + 16 * h)), 7);
  for (int64_t s = 0; s < steps; s++, block += STEP_BYTES, left += TILE_M * STEP_K) {
    if (ahead) fetch_ahead(block);
    for (int g = 0; g < STEP_K / GROUP_K; g++) {
      __m512i first = _mm512_loadu_si512(block + 64 * g), last = _mm512_loadu_si512(block + HALF_BLOCK + 64 * g);
#pragma GCC unroll 8
      for (int i = 0; i < tile; i++) {
        __m512i x = _mm512_set1_epi32(group_at(left + i * STEP_K + GROUP_K * g));
        total[i][0] = _mm512_dpbusd_epi32(total[i][0], x, first);
        total[i][1] = _mm512_dpbusd_epi32(total[i][1], x, last);
      }
    }
  }
  for (int i = 0; i < tile; i++)
    for (int h = 0; h < 2; h++) _mm512_storeu_si512(sums + i * BLOCK_N + 16 * h, total[i][h]);
}

static void multiply(const int8_t *block, const code_t *left, int rows, int64_t steps, const int32_t *code_sums,
                     int32_t *sums, int ahead) {
  for (int row = 0; row < rows; row += TILE_M, ahead = 0) {
    const code_t *tile = TO_TILE(left, row, steps);
    if (rows - row > 4) multiply_tile(block, tile, TILE_M, steps, code_sums, sums + row * BLOCK_N, ahead);
    else multiply_tile(block, tile, 4, steps, code_sums, sums + row * BLOCK_N, ahead);
  }
}

#elif defined(UNIT_AVXVNNI) || defined(UNIT_AVX2)

#if defined(UNIT_AVXVNNI) /* ---------------- unsigned times signed bytes, 8 out features per vector ---------------- */

typedef uint8_t code_t;
#define SHIFT 128 /* 2^7 */
#define DIGITS 1
#define VECTOR_N 8 /* out features per vector of sums */

INLINE __m256i add_products(__m256i total, __m256i left, __m256i right) {
  return _mm256_dpbusd_avx_epi32(total, left, right);
}
typedef int8_t right_t;
INLINE __m256i right_at(const right_t *place) { return _mm256_loadu_si256((const __m256i *)place); }
INLINE __m256i left_at(const code_t *place) { return _mm256_set1_epi32(group_at(place)); }

#else /* ---------------- AVX2: exact products of 16-bit numbers, 4 out features per vector ---------------- */

typedef int16_t code_t;
#define SHIFT 0
#define DIGITS 0
#define VECTOR_N 4 /* each with two sums: for the first two and the last two in features of a group */

INLINE __m256i add_products(__m256i total, __m256i left, __m256i right) {
  return _mm256_add_epi32(total, _mm256_madd_epi16(left, right));
}
typedef int16_t right_t; /* codes are widened once, for all tiles */
INLINE __m256i right_at(const right_t *place) { return _mm256_loadu_si256((const __m256i *)place); }
INLINE __m256i left_at(const code_t *place) {
  int64_t group;
  memcpy(&group, place, 8);
  return _mm256_set1_epi64x(group);
}
#endif

#define TILE_M 6 /* times two vectors of sums: 12 of the 16 registers */
#define ROWS 48
#define CHUNK 8 /* steps that fit in the nearest cache: 16 KB of the weight, 3 or 6 KB of activations */

#define NEXT_GROUP (VECTOR_N == 8 ? 64 : 2 * 4 * VECTOR_N) /* elements from one group to the next */
#define NEXT_RIGHT (VECTOR_N == 8 ? STEP_BYTES : STEP_K / GROUP_K * NEXT_GROUP)

/* Multiplies a tile by two vectors of out features, over a chunk of steps. `first`: the sums start here. */
INLINE void multiply_tile(const right_t *right, const code_t *left, int tile, int64_t steps, const int32_t *code_sums,
                          int32_t *sums, int first) {
  __m256i total[TILE_M][2];
  for (int i = 0; i < tile; i++)
    for (int v = 0; v < 2; v++) {
#if VECTOR_N == 8
      const int32_t *from = first ? code_sums + 8 * v : sums + i * BLOCK_N + 8 * v;
      total[i][v] = _mm256_loadu_si256((const __m256i *)from);
      if (first) total[i][v] = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), total[i][v]), 7);
#else
      __m128i before = first ? _mm_setzero_si128() : _mm_loadu_si128((const __m128i *)(sums + i * BLOCK_N + 4 * v));
      total[i][v] = _mm256_cvtepu32_epi64(before);
      (void)code_sums;
#endif
    }
  for (int64_t s = 0; s < steps; s++, right += NEXT_RIGHT, left += TILE_M * STEP_K)
    for (int g = 0; g < STEP_K / GROUP_K; g++) {
      __m256i low = right_at(right + NEXT_GROUP * g), high = right_at(right + NEXT_GROUP * g + 4 * VECTOR_N);
#pragma GCC unroll 6
      for (int i = 0; i < tile; i++) {
        __m256i x = left_at(left + i * STEP_K + GROUP_K * g);
        total[i][0] = add_products(total[i][0], x, low);
        total[i][1] = add_products(total[i][1], x, high);
        KEEP(total[i][0]);
        KEEP(total[i][1]);
      }
    }
  for (int i = 0; i < tile; i++) {
#if VECTOR_N == 8
    for (int v = 0; v < 2; v++) _mm256_storeu_si256((__m256i *)(sums + i * BLOCK_N + 8 * v), total[i][v]);
#else
    __m256i both = _mm256_hadd_epi32(total[i][0], total[i][1]); /* outputs 0 1 4 5 2 3 6 7 */
    _mm256_storeu_si256((__m256i *)(sums + i * BLOCK_N), _mm256_permute4x64_epi64(both, 0xD8));
#endif
  }
}

/* The codes that tiles read from a chunk of a block: the block itself, or a 16-bit copy for two vectors. */
INLINE const right_t *read_chunk(const int8_t *block, int64_t steps, right_t *room) {
#if VECTOR_N == 8
  (void)steps;
  (void)room;
  return block;
#else
  for (int64_t s = 0; s < steps; s++)
    for (int g = 0; g < STEP_K / GROUP_K; g++)
      for (int v = 0; v < 2; v++) {
        const int8_t *place = block + s * STEP_BYTES + 64 * g + 4 * VECTOR_N * v;
        __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)place));
        _mm256_store_si256((__m256i *)(room + s * NEXT_RIGHT + NEXT_GROUP * g + 4 * VECTOR_N * v), codes);
      }
  return room;
#endif
}

static void multiply(const int8_t *block, const code_t *left, int rows, int64_t steps, const int32_t *code_sums,
                     int32_t *sums, int ahead) {
  right_t room[VECTOR_N == 8 ? 1 : CHUNK * NEXT_RIGHT] __attribute__((aligned(32)));
  for (int64_t step = 0; step < steps; step += CHUNK) {
    int64_t here = steps - step < CHUNK ? steps - step : CHUNK;
    for (int n = 0; n < BLOCK_N; n += 2 * VECTOR_N) {
      const int8_t *codes = block + step * STEP_BYTES + n / 16 * HALF_BLOCK + n % 16 * 4;
      if (ahead && n % 16 == 0)
        for (int64_t s = 0; s < here; s++)
          for (int line = 0; line < HALF_BLOCK / 64; line++)
            __builtin_prefetch(codes + (s + CHUNK) * STEP_BYTES + 64 * line, 0, 2);
      const right_t *right = read_chunk(codes, here, room);
      for (int row = 0; row < rows; row += TILE_M) {
        const code_t *tile = TO_TILE(left, row, steps) + step * TILE_M * STEP_K;
        int32_t *to = sums + row * BLOCK_N + n;
        switch (rows - row) {
          case 1: multiply_tile(right, tile, 1, here, code_sums + n, to, !step); break;
          case 2: multiply_tile(right, tile, 2, here, code_sums + n, to, !step); break;
          case 3: multiply_tile(right, tile, 3, here, code_sums + n, to, !step); break;
          case 4: multiply_tile(right, tile, 4, here, code_sums + n, to, !step); break;
          default: multiply_tile(right, tile, TILE_M, here, code_sums + n, to, !step);
        }
      }
    }
  }
}

#elif defined(UNIT_NEON_I8MM) || defined(UNIT_NEON_DOTPROD)

typedef int8_t code_t;
#define SHIFT 0
#define TILE_M 4
#define ROWS 32
#define DIGITS 1

#if defined(UNIT_NEON_DOTPROD) /* ---------------- Arm dot products: 4 out features per vector ---------------- */

/* Multiplies a tile by 16 out features, with sums in 16 of the 32 registers. */
INLINE void multiply_tile(const int8_t *block, const code_t *left, int64_t steps, int32_t *sums) {
  int32x4_t total[TILE_M][4];
  for (int i = 0; i < TILE_M; i++)
    for (int v = 0; v < 4; v++) total[i][v] = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; s++, block += STEP_BYTES, left += TILE_M * STEP_K)
    for (int k = 0; k < STEP_K; k += 16) {
      int8x16_t x[TILE_M];
      for (int i = 0; i < TILE_M; i++) x[i] = vld1q_s8(left + i * STEP_K + k);
#define ADD_GROUP(lane)                                                                          \
  for (int v = 0; v < 4; v++) {                                                                  \
    int8x16_t right = vld1q_s8(block + (k / GROUP_K + lane) * 64 + 16 * v);                      \
    for (int i = 0; i < TILE_M; i++) total[i][v] = vdotq_laneq_s32(total[i][v], right, x[i], lane); \
  }
      ADD_GROUP(0) ADD_GROUP(1) ADD_GROUP(2) ADD_GROUP(3)
    }
  for (int i = 0; i < TILE_M; i++)
    for (int v = 0; v < 4; v++) vst1q_s32(sums + i * BLOCK_N + 4 * v, total[i][v]);
}

#else /* ---------------- Arm i8mm: products of 2 x 8 by 8 x 2 codes ---------------- */

INLINE void multiply_tile(const int8_t *block, const code_t *left, int64_t steps, int32_t *sums) {
  int32x4_t total[TILE_M / 2][8]; /* two rows times two out features each */
  for (int i = 0; i < TILE_M / 2; i++)
    for (int v = 0; v < 8; v++) total[i][v] = vdupq_n_s32(0);
  for (int64_t s = 0; s < steps; s++, block += STEP_BYTES, left += TILE_M * STEP_K)
    for (int k = 0; k < STEP_K; k += 8) {
      int8x16_t x[TILE_M / 2];
      for (int i = 0; i < TILE_M / 2; i++)
        x[i] = vcombine_s8(vld1_s8(left + 2 * i * STEP_K + k), vld1_s8(left + (2 * i + 1) * STEP_K + k));
      for (int v = 0; v < 4; v++) {
        int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(block + k / GROUP_K * 64 + 16 * v));
        int32x4_t high = vreinterpretq_s32_s8(vld1q_s8(block + (k / GROUP_K + 1) * 64 + 16 * v));
        int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(low, high)); /* 8 codes for each of two out features */
        int8x16_t last = vreinterpretq_s8_s32(vzip2q_s32(low, high));
        for (int i = 0; i < TILE_M / 2; i++) {
          total[i][2 * v] = vmmlaq_s32(total[i][2 * v], x[i], first);
          total[i][2 * v + 1] = vmmlaq_s32(total[i][2 * v + 1], x[i], last);
        }
      }
    }
  for (int i = 0; i < TILE_M / 2; i++)
    for (int v = 0; v < 8; v++) {
      vst1_s32(sums + 2 * i * BLOCK_N + 2 * v, vget_low_s32(total[i][v]));
      vst1_s32(sums + (2 * i + 1) * BLOCK_N + 2 * v, vget_high_s32(total[i][v]));
    }
}
#endif

static void multiply(const int8_t *block, const code_t *left, int rows, int64_t steps, const int32_t *code_sums,
                     int32_t *sums, int ahead) {
  (void)code_sums;
  (void)ahead;
  for (int half = 0; half < 2; half++)
    for (int row = 0; row < rows; row += TILE_M)
      multiply_tile(block + half * HALF_BLOCK, TO_TILE(left, row, steps), steps, sums + row * BLOCK_N + 16 * half);
}

#else /* ---------------- any processor: plain loops, left to the compiler ---------------- */

typedef int8_t code_t;
#define SHIFT 0
#define TILE_M 1
#define ROWS 32
#define DIGITS 0

static void multiply(const int8_t *block, const code_t *left, int rows, int64_t steps, const int32_t *code_sums,
                     int32_t *sums, int ahead) {
  (void)code_sums;
  (void)ahead;
  memset(sums, 0, (size_t)rows * BLOCK_N * 4);
  for (int64_t s = 0; s < steps; s++)
    for (int half = 0; half < 2; half++)
      for (int row = 0; row < rows; row++)
        for (int g = 0; g < STEP_K / GROUP_K; g++) {
          const int8_t *right = block + s * STEP_BYTES + half * HALF_BLOCK + 64 * g;
          const code_t *x = TO_TILE(left, row, steps) + s * STEP_K + GROUP_K * g;
          int32_t *total = sums + row * BLOCK_N + 16 * half;
          for (int n = 0; n < 16; n++)
            total[n] += x[0] * right[4 * n] + x[1] * right[4 * n + 1] + x[2] * right[4 * n + 2] +
                        x[3] * right[4 * n + 3];
        }
}
#endif

#if !defined(UNIT_AMX)
INLINE void prepare_unit(void) {}
INLINE void release_unit(void) {}
#endif
#if SHIFT
#define SHIFTED(code) ((int32_t)(code) - SHIFT)
#else
#define SHIFTED(code) ((int32_t)(code))
#endif

#endif
