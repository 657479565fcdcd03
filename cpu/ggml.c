/* Dequantizes llama.cpp's weight blocks to float16: bit for bit what its package `gguf` computes in float32, rounded
 * (kernels/ggml.py).
 *
 * A block begins or ends with its float16 scales; the layouts are those of ggml's ggml-common.h. Callers use one thread
 * per tensor, so nothing here is parallel.
 */
#include "quantize8.h"

#define SHORT_BLOCK 32 /* weights per block of the older types */
#define LONG_BLOCK 256 /* of the K types, whose sub-blocks of 16 or 32 weights have their own scales */

enum type { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

INLINE float half_at(const uint8_t *bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  return float_of_half(half);
}

/* Q4_0, Q4_1, Q5_0, Q5_1: a scale, a minimum (or none), fifth bits (or none), and two weights per byte. */
INLINE void short_block(const uint8_t *block, int has_least, int has_fifth, float *values) {
  float scale = half_at(block), least = has_least ? half_at(block + 2) : 0;
  const uint8_t *fifths = block + (has_least ? 4 : 2), *pairs = fifths + (has_fifth ? 4 : 0);
  uint32_t bits = 0;
  if (has_fifth) memcpy(&bits, fifths, 4);
  for (int k = 0; k < 16; k++) {
    int low = pairs[k] & 15, high = pairs[k] >> 4;
    if (has_fifth) {
      low |= (bits >> k & 1) << 4;
      high |= (bits >> (k + 16) & 1) << 4;
    }
    if (has_least) {
      values[k] = scale * (float)low + least;
      values[k + 16] = scale * (float)high + least;
    } else {
      values[k] = scale * (float)(low - (has_fifth ? 16 : 8));
      values[k + 16] = scale * (float)(high - (has_fifth ? 16 : 8));
    }
  }
}

INLINE void q8_0_block(const uint8_t *block, float *values) {
  float scale = half_at(block);
  const int8_t *codes = (const int8_t *)block + 2;
  for (int k = 0; k < SHORT_BLOCK; k++) values[k] = scale * (float)codes[k];
}

/* Q4_K, Q5_K: a scale for scales and one for minimums, six bits of each for 8 sub-blocks of 32 weights, and fifth bits
 * (or none). */
INLINE void long_block(const uint8_t *block, int has_fifth, float *values) {
  float scale = half_at(block), least = half_at(block + 2);
  const uint8_t *packed = block + 4, *fifths = block + 16, *pairs = fifths + (has_fifth ? 32 : 0);
  for (int part = 0; part < 8; part++) {
    int i = part & 3, high = part > 3;
    int code = high ? (packed[i + 8] & 15) | (packed[i] >> 2 & 0x30) : packed[i] & 63;
    int low = high ? packed[i + 8] >> 4 | (packed[i + 4] >> 2 & 0x30) : packed[i + 4] & 63;
    float step = scale * (float)code, under = least * (float)low;
    const uint8_t *bytes = pairs + part / 2 * 32;
    int shift = part % 2 * 4;
    for (int k = 0; k < 32; k++) {
      int weight = bytes[k] >> shift & 15;
      if (has_fifth) weight |= (fifths[k] >> part & 1) << 4;
      values[part * 32 + k] = step * (float)weight - under;
    }
  }
}

/* Q6_K: 4 low bits, 2 high bits, a signed scale for every 16 weights, and a scale for those scales. */
INLINE void q6_k_block(const uint8_t *block, float *values) {
  const uint8_t *low = block, *high = block + 128;
  const int8_t *scales = (const int8_t *)block + 192;
  float scale = half_at(block + 208);
  for (int part = 0; part < 8; part++) { /* 32 weights */
    const uint8_t *nibbles = low + part / 4 * 64 + part % 2 * 32, *pairs = high + part / 4 * 32;
    int low_shift = part / 2 % 2 * 4, high_shift = part % 4 * 2;
    for (int half = 0; half < 2; half++) {
      float step = scale * (float)scales[part * 2 + half];
      for (int k = half * 16; k < half * 16 + 16; k++) {
        int weight = (nibbles[k] >> low_shift & 15) | (pairs[k] >> high_shift & 3) << 4;
        values[part * 32 + k] = step * (float)(weight - 32);
      }
    }
  }
}

/* Converts float32 values to float16 bits, rounded half to even. */
static void put_halves(const float *values, int count, uint16_t *halves) {
  int k = 0;
#if defined(__F16C__)
  for (; k < count; k += 8)
    _mm_storeu_si128((__m128i *)(halves + k), _mm256_cvtps_ph(_mm256_loadu_ps(values + k), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; k < count; k++) halves[k] = half_bits(round_to_half(values[k]));
}

/* Dequantizes consecutive blocks. Returns -1 for any other type. */
EXPORT int q8_ggml_halves(int type, const uint8_t *blocks, int64_t count, uint16_t *halves) {
  static const int bytes[] = {18, 20, 22, 24, 34, 144, 176, 210};
  if (type < Q4_0 || type > Q6_K) return -1;
  int size = type < Q4_K ? SHORT_BLOCK : LONG_BLOCK;
  for (int64_t b = 0; b < count; b++) {
    const uint8_t *block = blocks + b * bytes[type];
    float values[LONG_BLOCK];
    switch ((enum type)type) {
      case Q4_0: short_block(block, 0, 0, values); break;
      case Q4_1: short_block(block, 1, 0, values); break;
      case Q5_0: short_block(block, 0, 1, values); break;
      case Q5_1: short_block(block, 1, 1, values); break;
      case Q8_0: q8_0_block(block, values); break;
      case Q4_K: long_block(block, 0, values); break;
      case Q5_K: long_block(block, 1, values); break;
      case Q6_K: q6_k_block(block, values); break;
    }
    put_halves(values, size, halves + b * size);
  }
  return 0;
}
