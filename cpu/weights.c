/* Passes over a weight during conversion: scales, codes and statistics of its rows, and Q8_0 blocks.
 *
 * Each function equals its definition in quantize8/ops (reference.py, scales.py, q8_0.py) bit for bit. A row is read
 * into float32 once and stays in the nearest cache. Callers use one thread per tensor, so nothing here is parallel.
 */
#include "quantize8.h"

#define OUTLIER_SIGMAS 6       /* a weight beyond 6 standard deviations of its row is an outlier of its column */
#define STATS_TILE_ROWS 64     /* column sums: float32 over 64 rows, float64 over these tiles */
#define INT32_SQUARES 131072   /* so many squares of codes fit into an int32 sum */

static float row_absmax(const float *row, int64_t columns) {
  /* rounding is monotonic, so only the largest has to be rounded */
  float absmax = round_to_half(as_float(largest_magnitude(row, columns)));
  return absmax < INFINITY ? absmax : INFINITY;
}

static void encode_row(const float *row, int64_t columns, float absmax, int8_t *codes) {
  if (absmax == 0 || absmax == INFINITY) {
    memset(codes, 0, (size_t)columns);
    return;
  }
  float inverse = 1.0f / absmax * (float)INT8_MAX_CODE;
  for (int64_t k = 0; k < columns; k++) {
    float scaled = round_to_half(row[k]) * inverse;
    scaled = scaled < -127.0f ? -127.0f : scaled;
    scaled = scaled > 127.0f ? 127.0f : scaled;
    codes[k] = (int8_t)as_bits(scaled + ROUNDER);
  }
}

static int64_t sum_of_squares(const int8_t *codes, int64_t columns) {
  int64_t total = 0;
  for (int64_t first = 0; first < columns; first += INT32_SQUARES) {
    int64_t last = first + INT32_SQUARES < columns ? first + INT32_SQUARES : columns;
    int32_t squares = 0;
    for (int64_t k = first; k < last; k++) squares += (int32_t)codes[k] * codes[k];
    total += squares;
  }
  return total;
}

/* Column sums over up to STATS_TILE_ROWS rows, float32 [K] and int32 [K]. */
struct tile_sums {
  float *squares, *errors, *peaks;
  int32_t *counts;
};

static void add_row(const float *row, const int8_t *codes, int64_t columns, float absmax, struct tile_sums sums) {
  float scale = absmax / (float)INT8_MAX_CODE;
  /* q^2 K > 36 sum q^2, with one division per row: q^2 is an integer, so rounding down changes nothing */
  int32_t limit = (int32_t)(OUTLIER_SIGMAS * OUTLIER_SIGMAS * sum_of_squares(codes, columns) / columns);
  float *restrict squares = sums.squares, *restrict errors = sums.errors, *restrict peaks = sums.peaks;
  int32_t *restrict counts = sums.counts;
  for (int64_t k = 0; k < columns; k++) {
    int32_t code = codes[k];
    float value = row[k], error = value - (float)code * scale, magnitude = fabsf(value);
    squares[k] += value * value;
    errors[k] += error * error;
    counts[k] += code * code > limit;
    peaks[k] = magnitude > peaks[k] ? magnitude : peaks[k];
  }
}

/* Computes codes int8 [N, K] and absmax [N] of a weight [N, K], and adds its column statistics to float32, float64 and
 * int64 [K]. `chosen`: 1 if absmax is given, 2 if the codes are given too. Returns -1 if out of memory. */
EXPORT int q8_quantize_rows(int dtype, const void *weight, int64_t rows, int64_t columns, int chosen, int8_t *codes,
                            float *absmax, float *column_absmax, double *sum_square, double *sum_error,
                            int64_t *outliers) {
  float *work = calloc((size_t)columns * 5, 4);
  if (!work) return -1;
  struct tile_sums sums = {work, work + columns, work + 2 * columns, (int32_t *)(work + 3 * columns)};
  for (int64_t n = 0; n < rows; n++) {
    const float *row = read_row(dtype, row_of(dtype, weight, n, columns), columns, work + 4 * columns);
    int8_t *code = codes + n * columns;
    if (!chosen) absmax[n] = row_absmax(row, columns);
    if (chosen < 2) encode_row(row, columns, absmax[n], code);
    add_row(row, code, columns, absmax[n], sums);
    if ((n + 1) % STATS_TILE_ROWS && n + 1 < rows) continue;
    for (int64_t k = 0; k < columns; k++) {
      sum_square[k] += (double)sums.squares[k];
      sum_error[k] += (double)sums.errors[k];
      outliers[k] += sums.counts[k];
      column_absmax[k] = sums.peaks[k] > column_absmax[k] ? sums.peaks[k] : column_absmax[k];
    }
    memset(work, 0, (size_t)columns * 16);
  }
  free(work);
  return 0;
}

/* reference.exact_scales: scales [R] of values [R, K]: the smallest power of two from `least` on of which all values of
 * the row are multiples, at most 127 times; 0 if there is none up to `most`. */
EXPORT void q8_exact_scales(const float *values, int64_t rows, int64_t columns, float least, float most,
                            float *scales) {
  for (int64_t n = 0; n < rows; n++) {
    const float *row = values + n * columns;
    uint32_t bits = largest_magnitude(row, columns);
    scales[n] = 0;
    if (bits == 0 || bits >= INFINITY_BITS) continue;
    int exponent;
    float fraction = frexpf(as_float(bits), &exponent);
    float power = ldexpf(1.0f, exponent - 7 + (fraction > 127.0f / 128.0f));
    power = power < least ? least : power;
    if (power > most) continue;
    float inverse = 1.0f / power;
    int32_t unequal = 0;
    for (int64_t k = 0; k < columns; k++) unequal |= ((row[k] * inverse + ROUNDER) - ROUNDER) * power != row[k];
    scales[n] = unequal ? 0 : power;
  }
}

/* Returns whether all values are finite. */
EXPORT int q8_all_finite(int dtype, const void *values, int64_t count) {
  float part[1024];
  for (int64_t first = 0; first < count; first += 1024) {
    int64_t here = count - first < 1024 ? count - first : 1024;
    const float *row = read_row(dtype, row_of(dtype, values, 1, first), here, part);
    if (largest_magnitude(row, here) >= INFINITY_BITS) return 0;
  }
  return 1;
}

typedef float wide __attribute__((vector_size(64)));

#define WIDE 16         /* columns in a wide vector */
#define ROWS_AT_ONCE 4  /* rows whose sums stay in registers while the right matrix is read */

/* reference.add_low_rank, in place: rows [n, K] += scaling * (left [n, R] times right [R, K]). The right matrix is copied
 * by strips of columns: its rows are often a power of two apart, which the nearest cache does not hold together.
 * Returns -1 if out of memory. */
EXPORT int q8_add_low_rank(float *rows, const float *left, const float *right, int64_t count, int64_t columns,
                           int64_t rank, float scaling) {
  float *strip = calloc((size_t)rank * WIDE + 1, 4);
  if (!strip) return -1;
  for (int64_t first = 0; first < columns; first += WIDE) {
    size_t nbytes = 4 * (size_t)(columns - first < WIDE ? columns - first : WIDE);
    for (int64_t r = 0; r < rank; r++) memcpy(strip + r * WIDE, right + r * columns + first, nbytes);
    for (int64_t n = 0; n < count; n += ROWS_AT_ONCE) {
      int64_t here = count - n < ROWS_AT_ONCE ? count - n : ROWS_AT_ONCE;
      const float *factors[ROWS_AT_ONCE];
      wide sums[ROWS_AT_ONCE] = {0};
      for (int64_t i = 0; i < ROWS_AT_ONCE; i++) factors[i] = left + (n + (i < here ? i : 0)) * rank;
      for (int64_t r = 0; r < rank; r++) {
        wide values;
        memcpy(&values, strip + r * WIDE, sizeof values);
        for (int i = 0; i < ROWS_AT_ONCE; i++) sums[i] += factors[i][r] * values;
      }
      for (int64_t i = 0; i < here; i++) {
        wide values = {0};
        float *place = rows + (n + i) * columns + first;
        memcpy(&values, place, nbytes);
        values += scaling * sums[i];
        memcpy(place, &values, nbytes);
      }
    }
  }
  free(strip);
  return 0;
}

/* Sums terms into terms[0] like scales.folded: adds the second half to the first until one term is left. */
static float fold(float *restrict terms, int64_t count) {
  while (count > 1) {
    int64_t half = (count + 1) / 2;
    for (int64_t k = 0; k < count - half; k++) terms[k] += terms[half + k];
    count = half;
  }
  return terms[0];
}

/* The weighted squared error of a row quantized with an absmax. terms is scratch space for K numbers. */
static float row_error(const float *values, int64_t columns, float absmax, const float *weights, float *restrict terms) {
  float inverse = 1.0f / absmax * (float)INT8_MAX_CODE, scale = absmax / (float)INT8_MAX_CODE;
  for (int64_t k = 0; k < columns; k++) {
    float scaled = values[k] * inverse;
    scaled = scaled < -127.0f ? -127.0f : scaled;
    scaled = scaled > 127.0f ? 127.0f : scaled;
    float difference = values[k] - ((scaled + ROUNDER) - ROUNDER) * scale;
    terms[k] = weights[k] * (difference * difference);
  }
  return fold(terms, columns);
}

/* scales.search_absmax: absmax [N] of a weight [N, K], given weights and kept, float32 [K], and clips, float32
 * [clip_count], of which the first is 1. Returns -1 if out of memory. */
EXPORT int q8_search_rows(int dtype, const void *weight, int64_t rows, int64_t columns, const float *weights,
                          const float *kept, const float *clips, int clip_count, float least_scale, float *absmax) {
  float *work = malloc((size_t)columns * 12);
  if (!work) return -1;
  float *values = work, *terms = work + columns, *others = work + 2 * columns;
  int all_kept = 1;
  for (int64_t k = 0; k < columns; k++) {
    others[k] = weights[k] * kept[k];
    all_kept &= kept[k] > 0;
  }
  for (int64_t n = 0; n < rows; n++) {
    const float *row = read_row(dtype, row_of(dtype, weight, n, columns), columns, values);
    float peak = absmax[n] = row_absmax(row, columns), lowest = 0;
    if (peak == 0 || peak == INFINITY) continue;
    for (int64_t k = 0; k < columns; k++) {
      values[k] = round_to_half(row[k]);
      float needed = fabsf(values[k]) * (1.0f - kept[k]) * least_scale;
      lowest = needed > lowest ? needed : lowest;
    }
    float limit = row_error(values, columns, peak, weights, terms);
    float least = all_kept ? limit : row_error(values, columns, peak, others, terms);
    for (int c = 1; c < clip_count; c++) {
      float candidate = round_to_half(clips[c] * peak);
      if (candidate == 0 || candidate >= peak || candidate < lowest) continue;
      float error = row_error(values, columns, candidate, others, terms);
      if (error < least && (all_kept || row_error(values, columns, candidate, weights, terms) <= limit)) {
        absmax[n] = candidate;
        least = error;
      }
    }
  }
  free(work);
  return 0;
}

/* ---- Q8_0: blocks of 32 weights with one float16 scale, 34 bytes (kernels/q8_0.py) ---- */

#define Q8_0_BLOCK 32
#define Q8_0_BYTES 34

/* The bits of the largest magnitude in each block [B, 32], or those of NaN if it contains one. */
EXPORT void q8_0_peaks(const float *blocks, int64_t count, uint32_t *peaks) {
  for (int64_t b = 0; b < count; b++) peaks[b] = largest_magnitude(blocks + b * Q8_0_BLOCK, Q8_0_BLOCK);
}

/* Writes the codes of blocks [B, 32] to packed [B, 34], after the two bytes of the scale; rounds half away from 0. */
EXPORT void q8_0_encode(const float *blocks, const float *inverses, int64_t count, uint8_t *packed) {
  for (int64_t b = 0; b < count; b++) {
    const float *block = blocks + b * Q8_0_BLOCK;
    float inverse = inverses[b];
    uint8_t codes[Q8_0_BLOCK];
    for (int k = 0; k < Q8_0_BLOCK; k++) {
      float scaled = block[k] * inverse, magnitude = fabsf(scaled);
      int32_t whole = magnitude < 1e9f ? (int32_t)magnitude : 0;        /* a block that is not finite gets codes 0 */
      whole += magnitude - (float)whole >= 0.5f && magnitude < 1e9f;    /* adding 0.5 and truncating could round up */
      codes[k] = (uint8_t)(scaled < 0 ? -whole : whole);
    }
    memcpy(packed + b * Q8_0_BYTES + 2, codes, Q8_0_BLOCK);
  }
}

/* The index of the best of L levels for each block. Inverses and stored scales are [L, B]; weights [W, 32] repeat. */
EXPORT void q8_0_search(const float *blocks, int64_t count, const float *weights, int64_t weight_count,
                        const float *inverses, const float *stored, int64_t levels, int64_t *best) {
  for (int64_t b = 0; b < count; b++) {
    const float *block = blocks + b * Q8_0_BLOCK, *weight = weights + b % weight_count * Q8_0_BLOCK;
    float least = INFINITY;
    for (int64_t level = 0; level < levels; level++) {
      float inverse = inverses[level * count + b], scale = stored[level * count + b], terms[Q8_0_BLOCK];
      for (int k = 0; k < Q8_0_BLOCK; k++) {
        float magnitude = fabsf(block[k] * inverse), whole = floorf(magnitude);
        float code = whole + (magnitude - whole >= 0.5f ? 1.0f : 0.0f), difference = fabsf(block[k]) - code * scale;
        terms[k] = weight[k] * (difference * difference);
      }
      for (int k = 0; k < 16; k++) terms[k] += terms[16 + k]; /* as `fold` does, with lengths known to the compiler */
      for (int k = 0; k < 8; k++) terms[k] += terms[8 + k];
      for (int k = 0; k < 4; k++) terms[k] += terms[4 + k];
      float error = (terms[0] + terms[2]) + (terms[1] + terms[3]);
      if (error < least) {
        best[b] = level;
        least = error;
      }
    }
  }
}

/* squares and errors float64 [N, 32] += the squares of values [N, B, 32], and of their differences from the packed
 * values with scales float32 [N, B]. */
EXPORT void q8_0_add_squares(const float *values, const uint8_t *packed, const float *scales, int64_t rows,
                             int64_t blocks, double *squares, double *errors) {
  for (int64_t n = 0; n < rows; n++) {
    double *restrict square = squares + n * Q8_0_BLOCK, *restrict error = errors + n * Q8_0_BLOCK;
    for (int64_t b = 0; b < blocks; b++) {
      const float *block = values + (n * blocks + b) * Q8_0_BLOCK;
      const int8_t *codes = (const int8_t *)packed + (n * blocks + b) * Q8_0_BYTES + 2;
      float scale = scales[n * blocks + b];
      for (int k = 0; k < Q8_0_BLOCK; k++) {
        float difference = block[k] - (float)codes[k] * scale;
        square[k] += (double)block[k] * block[k];
        error[k] += (double)difference * difference;
      }
    }
  }
}
