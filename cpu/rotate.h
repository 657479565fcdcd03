/* The block Hadamard rotation of reference.rotate, in place and bit for bit, while a row is in the nearest cache.
 *
 * The stages of a fast Walsh-Hadamard transform are sums and differences of elements that are 1, 2, 4, ... apart. Below
 * LANES they are done within vectors: multiplying by 1 or -1 is exact, so one fused operation gives both the sum and the
 * difference. From LANES on they are done between vectors, as many as the registers hold, and then between those parts.
 */
#ifndef ROTATE_H
#define ROTATE_H
#include "vectors.h"

#define PART (LANES == 16 ? 256 : 64) /* elements that stay in registers */

/* Stage `distance`, below LANES. */
INLINE void stage_within(floats *vectors, int count, int distance) {
  floats signs;
  for (int i = 0; i < LANES; i++) signs[i] = i & distance ? -1.0f : 1.0f;
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) vectors[i] = fma_(vectors[i], signs, swapped(vectors[i], distance));
}

/* The stage of vectors that are `distance` apart. */
INLINE void stage_between(floats *vectors, int count, int distance) {
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) {
    if (i & distance || distance >= count) continue;
    floats sum = vectors[i] + vectors[i + distance], difference = vectors[i] - vectors[i + distance];
    vectors[i] = sum;
    vectors[i + distance] = difference;
  }
}

/* All stages of `count` adjacent vectors, then a factor. */
INLINE void rotate_vectors(float *values, int count, float factor) {
  floats vectors[16];
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) vectors[i] = load_floats(values + i * LANES);
  stage_within(vectors, count, 1);
  stage_within(vectors, count, 2);
  if (LANES > 4) stage_within(vectors, count, 4);
  if (LANES > 8) stage_within(vectors, count, 8);
  stage_between(vectors, count, 1);
  stage_between(vectors, count, 2);
  stage_between(vectors, count, 4);
  stage_between(vectors, count, 8);
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) {
    floats result = vectors[i] * factor;
    memcpy(values + i * LANES, &result, sizeof result);
  }
}

/* The last two stages of a block of four parts, then a factor. */
INLINE void combine_parts(float *values, int64_t part, float factor) {
  for (int64_t k = 0; k < part; k += LANES) {
    floats vectors[4];
    for (int i = 0; i < 4; i++) vectors[i] = load_floats(values + i * part + k);
    stage_between(vectors, 4, 1);
    stage_between(vectors, 4, 2);
    for (int i = 0; i < 4; i++) {
      floats result = vectors[i] * factor;
      memcpy(values + i * part + k, &result, sizeof result);
    }
  }
}

/* Rotates a row [K] in blocks of 256, 64 or 16, which divides K. */
static void rotate_row(float *values, int64_t columns, int32_t size) {
  for (int64_t k = 0; k < columns; k += size)
    if (size == 16) {
      rotate_vectors(values + k, 16 / LANES, 1.0f / 4);
    } else if (size == 64) {
      rotate_vectors(values + k, 64 / LANES, 1.0f / 8);
    } else if (PART == 256) {
      rotate_vectors(values + k, PART / LANES, 1.0f / 16);
    } else {
      for (int part = 0; part < 256; part += PART) rotate_vectors(values + k + part, PART / LANES, 1.0f);
      combine_parts(values + k, PART, 1.0f / 16);
    }
}

#endif
