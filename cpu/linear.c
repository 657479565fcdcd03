/* A linear layer on a packed weight: quantizing activations to int8 codes, the product, and the epilogue of a block.
 *
 * Many tokens (prefill): each token becomes one row of codes. In mode dynamic, what outlier columns lose is added in
 * float32. In modes static and hybrid they take part with 16 bits:
 *
 *     x = s (254 high + low)        w = absmax / 127 (c + second / 254)
 *
 * Few tokens (decode, M <= 16): activations keep their precision, because the time goes into reading the weight. Where
 * the unit has byte products, x is written in base 254, as three or four digits that are multiplied as separate rows:
 *
 *     x = s (d1 + d2 / 254 + d3 / 254^2 + ...)        s = absmax / 127
 *
 * On other units the product is computed in float32. To read the code, start at q8_linear. The result of a token does
 * not depend on the other tokens, except in mode dynamic, where an outlier of one token corrects its column for all of
 * them, as in LLM.int8().
 */
#include "rotate.h"

#define DECODE_TOKENS 16
#define NO_LIMIT 0x80000000u          /* above the bits of every magnitude */
#define TOKEN_SIGMAS 8.0f             /* hybrid: elements beyond 8 root mean squares of their token use 16 bits */
#define LEAST_SQUARES 0x1p-100f       /* smaller sums of squares have lost digits: no element is an outlier then */
#define HALF_A_CACHE (1 << 20)        /* bytes of the second-level cache that activations may occupy */
#define PART_BYTES (3 << 18)          /* of weight multiplied by all tokens in turn, if activations are larger */
#define LEAST_PARALLEL (1 << 17)      /* multiplications from which on a second thread pays off */

enum mode { DYNAMIC, STATIC, HYBRID };

/* The arguments of a call. Without stored outlier columns, wide_count and exact are 0, and apart may be NULL. */
struct q8_linear {
  const void *x;               /* [M, K] of dtype */
  void *out;                   /* [M, N] of dtype */
  const int8_t *weight;        /* packed [N, K], followed by the second digits of `exact` columns, in separate steps */
  const float *scale;          /* [N / 32, 32], absmax / 127 */
  const int32_t *code_sums;    /* [N / 32, 32], from q8_pack */
  const float *bias;           /* [N], or NULL */
  const int64_t *wide;         /* [wide_count], outlier columns in modes static and hybrid */
  const int8_t *apart;         /* packed [N, wide_count], their codes */
  const int32_t *apart_sums;
  int64_t tokens, columns, outputs, wide_count, exact;
  float threshold;             /* mode dynamic; 0: nothing is an outlier */
  int32_t dtype, mode, threads;
  int32_t rotation;            /* of x: in blocks of so many columns, which divide K; then mode is DYNAMIC; 0: none */
};

/* The state of a call. */
struct call {
  const struct q8_linear *in;
  int64_t steps, high_steps, blocks, parts; /* steps: of K plus the second digits */
  int digits;                               /* per token; 0: computed in float32 */
  uint32_t limit;                           /* bits of the threshold */
  code_t *codes, *high;                     /* tiles of all columns; high digits of outlier columns */
  float *values;                            /* decode: [M, steps * 64] */
  float *token_scale;                       /* [M] */
  int32_t *found;                           /* dynamic: [K], 1 at outlier columns */
  int64_t *outliers, outlier_count;
  float *residual;                          /* [M, outlier_count], what their codes miss */
  int32_t *words, *factors;                 /* hybrid: [M, most], the outlier elements of each token */
  int32_t *counts;                          /* [M, 2], number of negative and of positive ones */
  int64_t most;
  int failed;
};

INLINE int64_t tiles_of(int64_t rows) { return ceil_div(rows, TILE_M); }

/* Where the codes of a row begin. The codes of its next step are TILE_M * 64 further on. */
INLINE code_t *row_codes(code_t *codes, int64_t row, int64_t steps) {
  return codes + row / TILE_M * steps * TILE_M * STEP_K + row % TILE_M * STEP_K;
}
#define NEXT_STEP (TILE_M * STEP_K)

INLINE float inverse_of(float absmax) { /* 0 if there is no finite inverse */
  if (absmax == 0) return 0;
  float inverse = 1.0f / absmax * (float)INT8_MAX_CODE;
  return magnitude_of(inverse) < INFINITY_BITS && magnitude_of(absmax) < INFINITY_BITS ? inverse : 0;
}

/* Rounds a scaled value to its code, and adds SHIFT. */
INLINE code_t code_of(float scaled) { return (code_t)as_bits(scaled + (ROUNDER + SHIFT)); }

static void encode(const float *values, int64_t steps, float inverse, code_t *codes) {
  for (int64_t s = 0; s < steps; s++)
    for (int k = 0; k < STEP_K; k++) codes[s * NEXT_STEP + k] = code_of(values[s * STEP_K + k] * inverse);
}

/* Allocates room for a token's float32 values, in whole steps. */
static float *token_room(int64_t columns) { return malloc((size_t)(ceil_div(columns, STEP_K) + 1) * STEP_K * 4); }

/* Reads a token into `room` as float32, rotated, padded with zeros to whole steps. */
static float *read_token(const struct q8_linear *in, int64_t token, float *room) {
  const float *row = read_row(in->dtype, row_of(in->dtype, in->x, token, in->columns), in->columns, room);
  if (row != room) memcpy(room, row, (size_t)in->columns * 4);
  if (in->rotation) rotate_row(room, in->columns, in->rotation);
  memset(room + in->columns, 0, (size_t)(ceil_div(in->columns, STEP_K) * STEP_K - in->columns) * 4);
  return room;
}

/* ---- prefill, mode dynamic: codes ---- */

/* Sets a token's outliers to 0 and `found` to 1 at their columns. Returns the largest magnitude left, or NaN's. */
static uint32_t take_outliers(float *values, int64_t steps, uint32_t limit, int32_t *found) {
  int32_t peak = 0;
  for (int64_t s = 0; s < steps; s++) {
    float *part = values + s * STEP_K;
    int32_t any = 0;
    for (int k = 0; k < STEP_K; k++) {
      int32_t magnitude = (int32_t)magnitude_of(part[k]);
      int32_t outlier = magnitude >= (int32_t)limit && magnitude <= (int32_t)INFINITY_BITS;
      any |= outlier;
      magnitude = outlier ? 0 : magnitude;
      peak = magnitude > peak ? magnitude : peak;
    }
    if (!any) continue;
    for (int k = 0; k < STEP_K; k++) {
      uint32_t magnitude = magnitude_of(part[k]);
      if (magnitude < limit || magnitude > INFINITY_BITS) continue;
      part[k] = 0;
      int32_t *mark = found + s * STEP_K + k; /* shared by threads, which only write marks not set yet */
      if (!__atomic_load_n(mark, __ATOMIC_RELAXED)) __atomic_store_n(mark, 1, __ATOMIC_RELAXED);
    }
  }
  return (uint32_t)peak;
}

static void encode_token(void *context, int64_t token) {
  struct call *call = context;
  int64_t steps = ceil_div(call->in->columns, STEP_K);
  float *room = token_room(call->in->columns);
  if (!room) {
    call->failed = 1;
    return;
  }
  float *values = read_token(call->in, token, room);
  uint32_t peak = largest_magnitude(values, steps * STEP_K);
  if (peak >= call->limit) peak = take_outliers(values, steps, call->limit, call->found);
  float absmax = as_float(peak), inverse = inverse_of(absmax);
  if (inverse == 0) memset(values, 0, (size_t)steps * STEP_K * 4); /* infinity * 0 is NaN */
  encode(values, steps, inverse, row_codes(call->codes, token, call->steps));
  call->token_scale[token] = absmax / (float)INT8_MAX_CODE;
  free(room);
}

/* Computes residual = x - code * scale in outlier columns. */
static void take_residual(void *context, int64_t token) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  const void *row = row_of(in->dtype, in->x, token, in->columns);
  const code_t *codes = row_codes(call->codes, token, call->steps);
  float *residual = call->residual + token * call->outlier_count;
  for (int64_t j = 0; j < call->outlier_count; j++) {
    int64_t k = call->outliers[j];
    float room, value = *read_row(in->dtype, row_of(in->dtype, row, 1, k), 1, &room);
    float code = (float)SHIFTED(codes[k / STEP_K * NEXT_STEP + k % STEP_K]);
    residual[j] = value - code * call->token_scale[token];
  }
}

/* ---- prefill, modes static and hybrid: codes, with outliers in two digits ---- */

/* Computes the largest magnitude, and the sum of squares in 64 lanes, in the order of reference.token_outliers. */
static uint32_t peak_and_squares(const float *values, int64_t steps, float *squares) {
  float lanes[STEP_K];
  int32_t peak = 0;
  for (int first = 0; first < STEP_K; first += 32) {
    floats sum[32 / LANES] = {0};
    ints top[32 / LANES] = {0};
    for (int64_t s = 0; s < steps; s++)
      for (int v = 0; v < 32 / LANES; v++) {
        floats value = load_floats(values + s * STEP_K + first + v * LANES);
        sum[v] += value * value;
        top[v] = larger(top[v], (ints)value & (int32_t)MAGNITUDE);
      }
    memcpy(lanes + first, sum, sizeof sum);
    int32_t tops[32];
    memcpy(tops, top, sizeof top);
    for (int i = 0; i < 32; i++) peak = tops[i] > peak ? tops[i] : peak;
  }
  for (int half = STEP_K / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[half + i];
  *squares = lanes[0];
  return (uint32_t)peak;
}

/* The outlier elements of one token: their columns are in words and the bits of their values in factors, negative ones
 * from the front and positive ones from the back. */
struct own {
  int32_t *words, *factors, *counts;
  int64_t most;
};

/* Moves a token's outlier elements into `own` and sets them to 0. Returns the largest magnitude left, and stores that
 * of the outliers in `largest`. */
static uint32_t take_own(float *values, int64_t steps, uint32_t bound, struct own own, uint32_t *largest) {
  int32_t peak = 0;
  for (int64_t s = 0; s < steps; s++) {
    float *part = values + s * STEP_K;
    int32_t any = 0;
    for (int k = 0; k < STEP_K; k++) {
      int32_t magnitude = (int32_t)magnitude_of(part[k]), above = magnitude > (int32_t)bound;
      any |= above;
      magnitude = above ? 0 : magnitude;
      peak = magnitude > peak ? magnitude : peak;
    }
    if (!any) continue;
    for (int k = 0; k < STEP_K; k++) {
      if (magnitude_of(part[k]) <= bound) continue;
      int positive = part[k] > 0;
      int64_t place = positive ? own.most - 1 - own.counts[1] : own.counts[0];
      own.words[place] = (int32_t)(s * STEP_K + k);
      own.factors[place] = (int32_t)as_bits(part[k]);
      own.counts[positive]++;
      *largest = magnitude_of(part[k]) > *largest ? magnitude_of(part[k]) : *largest;
      part[k] = 0;
    }
  }
  return (uint32_t)peak;
}

/* The offset of a column's codes in a block, in bytes: words of four columns, one word per out feature. */
INLINE int32_t word_of(int64_t column) {
  return (int32_t)(column / STEP_K * STEP_BYTES + column % STEP_K / GROUP_K * 64);
}

/* Splits `scaled` into two digits: returns the high one, and stores the code of the low one. */
INLINE float split(float scaled, code_t *low) {
  float high = (scaled / (float)DIGIT_BASE + ROUNDER) - ROUNDER;
  *low = code_of(scaled - high * (float)DIGIT_BASE);
  return high;
}

static void encode_token_16(void *context, int64_t token) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int64_t steps = ceil_div(in->columns, STEP_K), exact_steps = call->steps - steps;
  float *values = token_room(in->columns), *apart = calloc((size_t)(call->high_steps + 1) * STEP_K, 4);
  if (!values || !apart) {
    call->failed = 1;
    free(values);
    free(apart);
    return;
  }
  read_token(in, token, values);
  for (int64_t j = 0; j < in->wide_count; j++) apart[j] = values[in->wide[j]];
  for (int64_t j = 0; j < in->wide_count; j++) values[in->wide[j]] = 0;

  struct own own = {call->words + token * call->most, call->factors + token * call->most, call->counts + 2 * token,
                    call->most};
  uint32_t largest = 0, peak;
  if (in->mode == HYBRID) {
    float squares;
    peak = peak_and_squares(values, steps, &squares);
    uint32_t bound = as_bits(TOKEN_SIGMAS * sqrtf(squares / (float)in->columns));
    if (squares >= LEAST_SQUARES && peak > bound) peak = take_own(values, steps, bound, own, &largest);
  } else {
    peak = largest_magnitude(values, steps * STEP_K);
  }
  uint32_t wide_peak = largest_magnitude(apart, in->wide_count); /* compared by their bits, NaN is the largest */
  largest = wide_peak > largest ? wide_peak : largest;
  uint32_t needed = as_bits(as_float(largest) / (float)DIGIT_BASE); /* two digits hold 127 * 254 steps */
  float absmax = as_float(needed > peak ? needed : peak), inverse = inverse_of(absmax);
  if (inverse == 0) {
    memset(values, 0, (size_t)steps * STEP_K * 4);
    memset(apart, 0, (size_t)call->high_steps * STEP_K * 4);
  }
  code_t *codes = row_codes(call->codes, token, call->steps), *high = row_codes(call->high, token, call->high_steps);
  encode(values, steps, inverse, codes);
  for (int64_t j = 0; j < call->high_steps * STEP_K; j++) {
    code_t low;
    high[j / STEP_K * NEXT_STEP + j % STEP_K] = code_of(split(apart[j] * inverse, &low));
    if (j < in->wide_count) codes[in->wide[j] / STEP_K * NEXT_STEP + in->wide[j] % STEP_K] = low;
  }
  for (int64_t s = 0; s < exact_steps; s++) /* for the second digits; those beyond `exact` are multiplied by zeros */
    memcpy(codes + (steps + s) * NEXT_STEP, high + s * NEXT_STEP, STEP_K * sizeof(code_t));
  for (int64_t i = 0; i < own.counts[0] + own.counts[1]; i++) {
    int64_t place = i < own.counts[0] ? i : own.most - 1 - (i - own.counts[0]), k = own.words[place];
    float digit = split(as_float((uint32_t)own.factors[place]) * inverse, codes + k / STEP_K * NEXT_STEP + k % STEP_K);
    own.words[place] = word_of(k);
    own.factors[place] = (int32_t)fabsf(digit) << 8 * (k % GROUP_K);
  }
  call->token_scale[token] = (float)DIGIT_BASE * (absmax / (float)INT8_MAX_CODE);
  free(values);
  free(apart);
}

/* ---- decode: digits, or float32 values ---- */

static void encode_digits(void *context, int64_t token) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int64_t steps = ceil_div(in->columns, STEP_K), tokens = in->tokens;
  float *rest = read_token(in, token, call->values + token * call->steps * STEP_K);
  float absmax = as_float(largest_magnitude(rest, steps * STEP_K)), inverse = inverse_of(absmax);
  call->token_scale[token] = absmax / (float)INT8_MAX_CODE;
  for (int64_t k = 0; k < steps * STEP_K; k++) rest[k] = inverse == 0 ? 0 : rest[k] * inverse;
  code_t *above = NULL;
  for (int d = 0; d < call->digits; d++) {
    code_t *codes = row_codes(call->codes, d * tokens + token, call->steps);
    encode(rest, steps, 1.0f, codes);
    for (int64_t k = 0; k < steps * STEP_K; k++)
      rest[k] = (rest[k] - ((rest[k] + (ROUNDER + SHIFT)) - (ROUNDER + SHIFT))) * (float)DIGIT_BASE;
    for (int64_t s = steps; s < call->steps; s++) /* second digits are worth 1 / 254: the digit above multiplies them */
      for (int k = 0; k < STEP_K; k++) {
        int64_t j = (s - steps) * STEP_K + k, column = j < in->exact ? in->wide[j] : 0;
        codes[s * NEXT_STEP + k] = above ? above[column / STEP_K * NEXT_STEP + column % STEP_K] : SHIFT;
      }
    above = codes;
  }
}

static void read_values(void *context, int64_t token) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int64_t steps = ceil_div(in->columns, STEP_K);
  float *values = read_token(in, token, call->values + token * call->steps * STEP_K);
  float *second = values + steps * STEP_K;
  memset(second, 0, (size_t)(call->steps - steps) * STEP_K * 4);
  for (int64_t j = 0; j < in->exact; j++) second[j] = values[in->wide[j]] / (float)DIGIT_BASE;
}

/* ---- the epilogue of a block ---- */

/* The sums of some tokens for one block of 32 out features. */
struct block {
  const int32_t *sums;        /* [digits, rows, 32], the highest digit first; each is worth 254 times the next */
  int digits;
  int64_t rows;
  const float *token_scale;   /* [rows] */
  const float *residual;      /* [rows, columns] */
  const float *right;         /* [columns, 32] */
  int64_t columns;
  float bias[BLOCK_N];
};

INLINE int width_of(const struct q8_linear *in, int64_t number) {
  return in->outputs - number * BLOCK_N < BLOCK_N ? (int)(in->outputs - number * BLOCK_N) : BLOCK_N;
}

INLINE void read_bias(const struct q8_linear *in, int64_t number, float *bias) {
  memset(bias, 0, BLOCK_N * 4);
  if (in->bias) memcpy(bias, in->bias + number * BLOCK_N, (size_t)width_of(in, number) * 4);
}

#define HELD (LANES == 16 ? 8 : 2) /* rows whose sums stay in registers while columns are added */

/* out = sums * scales + residual times right + bias. Columns are added one after another, so that a column whose
 * residual is 0 changes no bit. */
INLINE void finish_rows(const struct q8_linear *in, const struct block *it, int64_t number, int64_t first_token,
                        int64_t row, int held, enum dtype dtype) {
  floats total[HELD][BLOCK_VECTORS];
  const float *scale = in->scale + number * BLOCK_N;
  for (int i = 0; i < held; i++)
    for (int v = 0; v < BLOCK_VECTORS; v++) {
      const int32_t *sums = it->sums + (row + i) * BLOCK_N + v * LANES;
      int64_t next = it->rows * BLOCK_N;
      floats value = to_floats(load_ints(sums + (it->digits - 1) * next));
      for (int d = it->digits - 2; d >= 0; d--)
        value = fma_(value, (floats){0} + 1.0f / DIGIT_BASE, to_floats(load_ints(sums + d * next)));
      total[i][v] = value * (it->token_scale[row + i] * load_floats(scale + v * LANES));
    }
  for (int64_t j = 0; j < it->columns; j++)
    for (int v = 0; v < BLOCK_VECTORS; v++) {
      floats right = load_floats(it->right + j * BLOCK_N + v * LANES);
      for (int i = 0; i < held; i++)
        total[i][v] = fma_((floats){0} + it->residual[(row + i) * it->columns + j], right, total[i][v]);
    }
  int64_t bytes = dtype == FLOAT32 ? 4 : 2;
  for (int i = 0; i < held; i++) {
    char *out = (char *)in->out + ((first_token + row + i) * in->outputs + number * BLOCK_N) * bytes;
    for (int v = 0; v < BLOCK_VECTORS; v++) total[i][v] += load_floats(it->bias + v * LANES);
    store_block(total[i], dtype, out, width_of(in, number));
  }
}

INLINE void finish_as(const struct q8_linear *in, const struct block *it, int64_t number, int64_t first_token,
                      enum dtype dtype) {
  int64_t row = 0;
  for (; row + HELD <= it->rows; row += HELD) finish_rows(in, it, number, first_token, row, HELD, dtype);
  for (; row < it->rows; row++) finish_rows(in, it, number, first_token, row, 1, dtype);
}

static void finish(const struct q8_linear *in, struct block *it, int64_t number, int64_t first_token) {
  read_bias(in, number, it->bias);
  switch (in->dtype) {
    case FLOAT32: finish_as(in, it, number, first_token, FLOAT32); break;
    case BFLOAT16: finish_as(in, it, number, first_token, BFLOAT16); break;
    default: finish_as(in, it, number, first_token, FLOAT16);
  }
}

/* right [32] = a column of one block * scale [32]. */
static void read_column(const int8_t *block, int64_t column, const float *scale, float *right) {
  const int8_t *words = block + word_of(column);
  int to_top = 8 * (int)(GROUP_K - 1 - column % GROUP_K);
  for (int v = 0; v < BLOCK_VECTORS; v++) {
    ints codes = (load_ints(words + v * LANES / 16 * HALF_BLOCK + v * LANES % 16 * 4) << to_top) >> 24;
    floats values = to_floats(codes) * load_floats(scale + v * LANES);
    memcpy(right + v * LANES, &values, sizeof values);
  }
}

/* sums [rows, 32] += the block's columns for the outlier elements of each token, times the high digits of these. */
static void add_own(const struct call *call, const int8_t *block, int64_t first_token, int64_t rows, int32_t *sums) {
  for (int64_t m = first_token; m < first_token + rows; m++, sums += BLOCK_N) {
    const int32_t *words = call->words + m * call->most, *factors = call->factors + m * call->most;
    int64_t negative = call->counts[2 * m], positive = call->most - call->counts[2 * m + 1];
    if (!negative && positive == call->most) continue;
    for (int v = 0; v < BLOCK_VECTORS; v++) {
      const int8_t *place = block + v * LANES / 16 * HALF_BLOCK + v * LANES % 16 * 4;
      ints total = {0};
      for (int64_t i = 0; i < negative; i++) total = add_dots(total, factors[i], load_ints(place + words[i]));
      total = -total;
      for (int64_t i = positive; i < call->most; i++) total = add_dots(total, factors[i], load_ints(place + words[i]));
      total += load_ints(sums + v * LANES);
      memcpy(sums + v * LANES, &total, sizeof total);
    }
  }
}

/* ---- the product, for a part of the out features at a time ---- */

INLINE int64_t part_begin(const struct call *call, int64_t part) { return part * call->blocks / call->parts; }

#define SUM_ROWS (ROWS + TILE_M)

static void multiply_part(void *context, int64_t part) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int64_t first = part_begin(call, part), last = part_begin(call, part + 1), columns = call->outlier_count;
  float *right = columns ? malloc((size_t)((last - first) * columns * BLOCK_N) * 4) : NULL;
  if (columns && !right) {
    call->failed = 1;
    return;
  }
  int32_t sums[SUM_ROWS * BLOCK_N] __attribute__((aligned(64)));
  prepare_unit();
  for (int64_t row = 0; row < in->tokens; row += ROWS) {
    int64_t rows = in->tokens - row < ROWS ? in->tokens - row : ROWS;
    for (int64_t n = first; n < last; n++) {
      const int8_t *block = in->weight + n * call->steps * STEP_BYTES;
      float *beside = right + (n - first) * columns * BLOCK_N;
      if (row == 0)
        for (int64_t j = 0; j < columns; j++)
          read_column(block, call->outliers[j], in->scale + n * BLOCK_N, beside + j * BLOCK_N);
      multiply(block, row_codes(call->codes, row, call->steps), (int)rows, call->steps, in->code_sums + n * BLOCK_N, sums,
               row == 0);
      struct block it = {sums, 1, rows, call->token_scale + row, call->residual + row * columns, beside, columns, {0}};
      finish(in, &it, n, row);
    }
  }
  release_unit();
  free(right);
}

static void multiply_part_16(void *context, int64_t part) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int32_t sums[(SUM_ROWS + ROWS) * BLOCK_N] __attribute__((aligned(64)));
  prepare_unit();
  for (int64_t row = 0; row < in->tokens; row += ROWS) {
    int64_t rows = in->tokens - row < ROWS ? in->tokens - row : ROWS;
    for (int64_t n = part_begin(call, part); n < part_begin(call, part + 1); n++) {
      const int8_t *block = in->weight + n * call->steps * STEP_BYTES;
      const int8_t *high_block = in->apart + n * call->high_steps * STEP_BYTES;
      memset(sums, 0, (size_t)rows * BLOCK_N * 4);
      if (call->high_steps)
        multiply(high_block, row_codes(call->high, row, call->high_steps), (int)rows, call->high_steps,
                 in->apart_sums + n * BLOCK_N, sums, row == 0);
      multiply(block, row_codes(call->codes, row, call->steps), (int)rows, call->steps, in->code_sums + n * BLOCK_N,
               sums + rows * BLOCK_N, row == 0);
      if (call->most) add_own(call, block, row, rows, sums);
      struct block it = {sums, 2, rows, call->token_scale + row, NULL, NULL, 0, {0}};
      finish(in, &it, n, row);
    }
  }
  release_unit();
}

#if DIGITS
static void decode_part(void *context, int64_t part) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int32_t sums[(4 * DECODE_TOKENS + SUM_ROWS) * BLOCK_N] __attribute__((aligned(64)));
  int64_t rows = call->digits * in->tokens;
  prepare_unit();
  for (int64_t n = part_begin(call, part); n < part_begin(call, part + 1); n++) {
    for (int64_t row = 0; row < rows; row += ROWS)
      multiply(in->weight + n * call->steps * STEP_BYTES, row_codes(call->codes, row, call->steps),
               (int)(rows - row < ROWS ? rows - row : ROWS), call->steps, in->code_sums + n * BLOCK_N,
               sums + row * BLOCK_N, row == 0);
    struct block it = {sums, call->digits, in->tokens, call->token_scale, NULL, NULL, 0, {0}};
    finish(in, &it, n, 0);
  }
  release_unit();
}
#else
#define PAIR_LANES 8 /* two out features times the four in features of a group */
#define PAIRS (BLOCK_N / 4) /* per half block */
#define MOST_TOGETHER 6     /* tokens times two pairs: 12 of the 16 registers */
#define FLOAT_STEPS 2       /* whose codes, values and sums in float32 fit into the nearest cache */
#define FLOAT_AHEAD (4 * STEP_BYTES) /* prefetch distance, for every line: halves are not read in memory order */
typedef float pair_floats __attribute__((vector_size(4 * PAIR_LANES)));
typedef int8_t pair_codes __attribute__((vector_size(PAIR_LANES)));

INLINE pair_floats multiply_add(pair_floats a, pair_floats b, pair_floats c) {
#if defined(__AVX2__)
  return (pair_floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

INLINE pair_floats codes_at(const int8_t *place) {
#if defined(__AVX2__)
  return (pair_floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)place)));
#else
  pair_codes codes;
  memcpy(&codes, place, sizeof codes);
  return __builtin_convertvector(codes, pair_floats);
#endif
}

INLINE pair_floats group_twice(const float *place) {
#if defined(__AVX2__)
  return (pair_floats)_mm256_broadcast_ps((const __m128 *)place);
#else
  return (pair_floats){place[0], place[1], place[2], place[3], place[0], place[1], place[2], place[3]};
#endif
}

/* totals [tokens][PAIRS] += values of some tokens times `pairs` pairs of out features: from `codes`, or with more than
 * two tokens from `wide`, the same in float32. */
INLINE void add_values(const int8_t *codes, const pair_floats *wide, const float *values, int64_t next_token,
                       int64_t steps, int tokens, int pairs, pair_floats *totals) {
  pair_floats total[MOST_TOGETHER][PAIRS];
  for (int i = 0; i < tokens; i++)
    for (int p = 0; p < pairs; p++) total[i][p] = totals[i * PAIRS + p];
  for (int64_t s = 0; s < steps; s++, codes += STEP_BYTES, values += STEP_K)
    for (int g = 0; g < STEP_K / GROUP_K; g++, wide += PAIRS) {
      if (tokens <= 2) __builtin_prefetch(codes + 64 * g + FLOAT_AHEAD, 0, 2);
#pragma GCC unroll 8
      for (int p = 0; p < pairs; p++) {
        pair_floats right = tokens > 2 ? wide[p] : codes_at(codes + 64 * g + PAIR_LANES * p);
#pragma GCC unroll 6
        for (int i = 0; i < tokens; i++) {
          total[i][p] = multiply_add(group_twice(values + i * next_token + GROUP_K * g), right, total[i][p]);
          KEEP(total[i][p]);
        }
      }
    }
  for (int i = 0; i < tokens; i++)
    for (int p = 0; p < pairs; p++) totals[i * PAIRS + p] = total[i][p];
}

/* Multiplies some tokens by half a block. */
static void add_half(const int8_t *codes, const pair_floats *wide, const float *values, int64_t next_token,
                     int64_t steps, int64_t tokens, pair_floats *totals) {
#define ADD(count, pairs)                                                                                        \
  case count:                                                                                                    \
    for (int p = 0; p < PAIRS; p += pairs)                                                                       \
      add_values(codes + PAIR_LANES * p, wide + p, values, next_token, steps, count, pairs, totals + p);         \
    break;
  switch (tokens) { ADD(1, 8) ADD(2, 4) ADD(3, 4) ADD(4, 2) ADD(5, 2) ADD(6, 2) }
#undef ADD
}

/* sums [tokens, 32] = values [tokens, next_token] times a block, in float32. The sums of a token do not depend on the
 * other tokens. */
static void multiply_float(const int8_t *block, const float *values, int64_t next_token, int64_t steps, int64_t tokens,
                           float *sums) {
  pair_floats totals[2][DECODE_TOKENS][PAIRS] = {0}, wide[FLOAT_STEPS * STEP_K / GROUP_K * PAIRS];
  for (int64_t step = 0; step < steps; step += FLOAT_STEPS) {
    int64_t here = steps - step < FLOAT_STEPS ? steps - step : FLOAT_STEPS;
    for (int half = 0; half < 2; half++) {
      const int8_t *codes = block + step * STEP_BYTES + half * HALF_BLOCK;
      for (int64_t g = 0; tokens > 2 && g < here * (STEP_K / GROUP_K); g++) {
        const int8_t *group = codes + g / (STEP_K / GROUP_K) * STEP_BYTES + g % (STEP_K / GROUP_K) * 64;
        __builtin_prefetch(group + FLOAT_AHEAD, 0, 2);
        for (int p = 0; p < PAIRS; p++) wide[g * PAIRS + p] = codes_at(group + PAIR_LANES * p);
      }
      for (int64_t m = 0, together; m < tokens; m += together) {
        int64_t groups = ceil_div(tokens - m, MOST_TOGETHER);
        together = ceil_div(tokens - m, groups);
        add_half(codes, wide, values + m * next_token + step * STEP_K, next_token, here, together, totals[half][m]);
      }
    }
  }
  for (int64_t m = 0; m < tokens; m++)
    for (int n = 0; n < BLOCK_N; n += 2) {
      pair_floats t = totals[n / 16][m][n % 16 / 2];
      sums[m * BLOCK_N + n] = (t[0] + t[1]) + (t[2] + t[3]);
      sums[m * BLOCK_N + n + 1] = (t[4] + t[5]) + (t[6] + t[7]);
    }
}

static void decode_part(void *context, int64_t part) {
  struct call *call = context;
  const struct q8_linear *in = call->in;
  int64_t bytes = in->dtype == FLOAT32 ? 4 : 2;
  for (int64_t n = part_begin(call, part); n < part_begin(call, part + 1); n++) {
    float sums[DECODE_TOKENS * BLOCK_N], bias[BLOCK_N];
    multiply_float(in->weight + n * call->steps * STEP_BYTES, call->values, call->steps * STEP_K, call->steps,
                   in->tokens, sums);
    read_bias(in, n, bias);
    for (int64_t m = 0; m < in->tokens; m++) {
      floats total[BLOCK_VECTORS];
      for (int v = 0; v < BLOCK_VECTORS; v++)
        total[v] = load_floats(sums + m * BLOCK_N + v * LANES) * load_floats(in->scale + n * BLOCK_N + v * LANES) +
                   load_floats(bias + v * LANES);
      store_block(total, in->dtype, (char *)in->out + (m * in->outputs + n * BLOCK_N) * bytes, width_of(in, n));
    }
  }
}
#endif

/* ---- a call ---- */

static struct call call_of(const struct q8_linear *in) {
  struct call call = {.in = in};
  call.steps = ceil_div(in->columns, STEP_K) + ceil_div(in->exact, STEP_K);
  call.high_steps = ceil_div(in->wide_count, STEP_K);
  call.blocks = ceil_div(in->outputs, BLOCK_N);
  call.limit = in->threshold > 0 && !in->rotation ? as_bits(in->threshold) : NO_LIMIT;
  return call;
}

static void free_call(struct call *call) {
  void *all[] = {call->codes, call->high,  call->values,  call->token_scale, call->found,
                 call->outliers, call->residual, call->words, call->factors,  call->counts};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static code_t *room_for_codes(int64_t rows, int64_t steps) {
  return malloc((size_t)(tiles_of(rows) * TILE_M * steps * STEP_K + 1) * sizeof(code_t));
}

/* Encodes many tokens. Returns 0, or -1 if out of memory. */
static int encode_tokens(struct call *call) {
  const struct q8_linear *in = call->in;
  int64_t tokens = in->tokens;
  call->codes = room_for_codes(tokens, call->steps);
  call->token_scale = malloc((size_t)tokens * 4);
  if (in->mode == DYNAMIC) {
    call->found = calloc((size_t)ceil_div(in->columns, STEP_K) * STEP_K, 4);
    if (!call->codes || !call->token_scale || !call->found) return -1;
    run_parallel(tokens, in->threads, encode_token, call);
    return -call->failed;
  }
  /* of K numbers, fewer than K / c^2 have a square above c^2 times the mean square */
  call->most = in->mode == HYBRID ? in->columns / (int64_t)(TOKEN_SIGMAS * TOKEN_SIGMAS) + 1 : 0;
  call->high = room_for_codes(tokens, call->high_steps);
  call->words = malloc((size_t)(tokens * call->most) * 4 + 4);
  call->factors = malloc((size_t)(tokens * call->most) * 4 + 4);
  call->counts = calloc((size_t)tokens * 2, 4);
  if (!call->codes || !call->token_scale || !call->high || !call->words || !call->factors || !call->counts) return -1;
  run_parallel(tokens, in->threads, encode_token_16, call);
  return -call->failed;
}

static int take_residuals(struct call *call) {
  const struct q8_linear *in = call->in;
  for (int64_t k = 0; k < in->columns; k++) call->outlier_count += call->found[k];
  if (!call->outlier_count) return 0;
  call->outliers = malloc((size_t)call->outlier_count * 8);
  call->residual = malloc((size_t)(in->tokens * call->outlier_count) * 4);
  if (!call->outliers || !call->residual) return -1;
  for (int64_t k = 0, j = 0; k < in->columns; k++)
    if (call->found[k]) call->outliers[j++] = k;
  run_parallel(in->tokens, in->threads, take_residual, call);
  return 0;
}

static int prefill(struct call *call) {
  const struct q8_linear *in = call->in;
  int two_digits = in->mode == STATIC || in->mode == HYBRID;
  if (encode_tokens(call)) return -1;
  if (!two_digits && take_residuals(call)) return -1;
  int64_t bytes = in->tokens * call->steps * STEP_K * (int64_t)sizeof(code_t);
  int64_t parts = call->blocks * call->steps * STEP_BYTES / PART_BYTES;
  parts = parts > 2 * in->threads ? parts : 2 * in->threads;
  call->parts = bytes <= HALF_A_CACHE || parts > call->blocks ? call->blocks : parts;
  run_parallel(call->parts, in->threads, two_digits ? multiply_part_16 : multiply_part, call);
  return -call->failed;
}

static int decode(struct call *call) {
  const struct q8_linear *in = call->in;
  int threads = in->tokens * in->columns * in->outputs < LEAST_PARALLEL ? 1 : in->threads;
  call->digits = !DIGITS ? 0 : in->dtype == FLOAT32 ? 4 : 3; /* exact to 2^-31 and 2^-23 of a token's absmax */
  call->values = malloc((size_t)(in->tokens * call->steps * STEP_K) * 4);
  call->codes = DIGITS ? room_for_codes(call->digits * in->tokens, call->steps) : NULL;
  call->token_scale = malloc((size_t)in->tokens * 4);
  if (!call->values || !call->token_scale || (DIGITS && !call->codes)) return -1;
  run_parallel(in->tokens, in->tokens * in->columns < LEAST_PARALLEL ? 1 : threads,
               DIGITS ? encode_digits : read_values, call);
  call->parts = call->blocks < 4 * threads ? call->blocks : 4 * threads;
  run_parallel(call->parts, threads, decode_part, call);
  return 0;
}

/* Computes reference.linear; modes static and hybrid use the integer form above. Returns 0, or -1 if out of memory. */
EXPORT int q8_linear(const struct q8_linear *in) {
  if (!in->tokens || !in->outputs) return 0;
  struct call call = call_of(in);
  int failed = in->tokens <= DECODE_TOKENS ? decode(&call) : prefill(&call);
  free_call(&call);
  return failed;
}

/* The codes that prefill multiplies: low and high int8 [M, K] (high is 0 except where a column has two digits), scale
 * float32 [M] of the low ones, and found int32 [K], which is 1 at outlier columns (mode dynamic). */
EXPORT int q8_encode(const struct q8_linear *in, int8_t *low, int8_t *high, float *scale, int32_t *found) {
  struct call call = call_of(in);
  int failed = encode_tokens(&call);
  memset(high, 0, (size_t)(in->tokens * in->columns));
  for (int64_t m = 0; !failed && m < in->tokens; m++) {
    const code_t *codes = row_codes(call.codes, m, call.steps);
    for (int64_t k = 0; k < in->columns; k++)
      low[m * in->columns + k] = (int8_t)SHIFTED(codes[k / STEP_K * NEXT_STEP + k % STEP_K]);
    scale[m] = call.token_scale[m] / (call.high ? (float)DIGIT_BASE : 1.0f);
    for (int64_t j = 0; j < in->wide_count; j++)
      high[m * in->columns + in->wide[j]] =
          (int8_t)SHIFTED(row_codes(call.high, m, call.high_steps)[j / STEP_K * NEXT_STEP + j % STEP_K]);
    for (int64_t i = 0; call.most && i < call.counts[2 * m] + call.counts[2 * m + 1]; i++) {
      int64_t negative = i < call.counts[2 * m], place = m * call.most;
      place += negative ? i : call.most - 1 - (i - call.counts[2 * m]);
      uint32_t word = (uint32_t)call.words[place], factor = (uint32_t)call.factors[place];
      int byte = 0;
      while (factor > 127) factor >>= 8, byte++;
      int64_t k = word / STEP_BYTES * STEP_K + word % STEP_BYTES / 64 * GROUP_K + byte;
      high[m * in->columns + k] = (int8_t)(negative ? -(int32_t)factor : (int32_t)factor);
    }
  }
  if (call.found) memcpy(found, call.found, (size_t)in->columns * 4);
  free_call(&call);
  return failed;
}

/* ---- codes times codes ---- */

struct product {
  struct call call;
  const int8_t *codes;
  int32_t *sums;
};

static void copy_codes(void *context, int64_t token) {
  struct product *it = context;
  int64_t columns = it->call.in->columns;
  const int8_t *from = it->codes + token * columns;
  code_t *to = row_codes(it->call.codes, token, it->call.steps);
  for (int64_t s = 0; s < it->call.steps; s++, to += NEXT_STEP)
    for (int k = 0; k < STEP_K; k++) to[k] = (code_t)((s * STEP_K + k < columns ? from[s * STEP_K + k] : 0) + SHIFT);
}

static void multiply_codes(void *context, int64_t n) {
  struct product *it = context;
  const struct q8_linear *in = it->call.in;
  int32_t sums[SUM_ROWS * BLOCK_N] __attribute__((aligned(64)));
  prepare_unit();
  for (int64_t row = 0; row < in->tokens; row += ROWS) {
    int64_t rows = in->tokens - row < ROWS ? in->tokens - row : ROWS;
    multiply(in->weight + n * it->call.steps * STEP_BYTES, row_codes(it->call.codes, row, it->call.steps), (int)rows,
             it->call.steps, in->code_sums + n * BLOCK_N, sums, row == 0);
    for (int64_t m = 0; m < rows; m++)
      memcpy(it->sums + (row + m) * in->outputs + n * BLOCK_N, sums + m * BLOCK_N, (size_t)width_of(in, n) * 4);
  }
  release_unit();
}

/* sums int32 [M, N] = codes int8 [M, K] times a packed weight [N, K] transposed, exact while 127^2 K < 2^31. */
EXPORT int q8_multiply(const int8_t *codes, int64_t tokens, int64_t columns, const int8_t *weight,
                       const int32_t *code_sums, int64_t outputs, int threads, int32_t *sums) {
  struct q8_linear in = {.weight = weight, .code_sums = code_sums, .tokens = tokens, .columns = columns, .outputs = outputs};
  struct product it = {call_of(&in), codes, sums};
  if (!(it.call.codes = room_for_codes(tokens, it.call.steps))) return -1;
  run_parallel(tokens, threads, copy_codes, &it);
  run_parallel(it.call.blocks, threads, multiply_codes, &it);
  free_call(&it.call);
  return 0;
}

/* ---- packing ---- */

struct packing {
  int8_t *codes, *tiles;
  int64_t rows, columns, step, steps; /* of the `steps` in a block, from `step` on */
  int32_t *code_sums;
};

INLINE int8_t *packed_row(const struct packing *it, int64_t n) { /* its first group; the next is 64 bytes further on */
  return it->tiles + (n / BLOCK_N * it->steps + it->step) * STEP_BYTES + n % BLOCK_N / 16 * HALF_BLOCK + n % 16 * 4;
}

static void pack_block(void *context, int64_t number) {
  const struct packing *it = context;
  int64_t last = (number + 1) * BLOCK_N < it->rows ? (number + 1) * BLOCK_N : it->rows;
  for (int64_t n = number * BLOCK_N; n < last; n++) {
    const int8_t *row = it->codes + n * it->columns;
    int8_t *to = packed_row(it, n);
    int64_t k = 0;
    uint32_t sum = 0; /* unsigned, because it may wrap around as the sums do */
    for (int64_t i = 0; i < it->columns; i++) sum += (uint32_t)(int32_t)row[i];
    for (; k + GROUP_K <= it->columns; k += GROUP_K)
      memcpy(to + k / STEP_K * STEP_BYTES + k % STEP_K * 16, row + k, GROUP_K);
    for (; k < it->columns; k++) to[k / STEP_K * STEP_BYTES + k % STEP_K / GROUP_K * 64 + k % GROUP_K] = row[k];
    it->code_sums[n] = (int32_t)((uint32_t)it->code_sums[n] + sum);
  }
}

static void unpack_block(void *context, int64_t number) {
  const struct packing *it = context;
  int64_t last = (number + 1) * BLOCK_N < it->rows ? (number + 1) * BLOCK_N : it->rows;
  for (int64_t n = number * BLOCK_N; n < last; n++) {
    const int8_t *from = packed_row(it, n);
    for (int64_t k = 0; k < it->columns; k++)
      it->codes[n * it->columns + k] = from[k / STEP_K * STEP_BYTES + k % STEP_K / GROUP_K * 64 + k % GROUP_K];
  }
}

/* Packs codes int8 [N, K] into zeroed tiles of `steps` steps, from step `step` on, and adds their sums to
 * code_sums [N / 32, 32]. */
EXPORT void q8_pack(const int8_t *codes, int64_t rows, int64_t columns, int64_t step, int64_t steps, int threads,
                    int8_t *tiles, int32_t *code_sums) {
  struct packing it = {(int8_t *)codes, tiles, rows, columns, step, steps, code_sums};
  run_parallel(ceil_div(rows, BLOCK_N), threads, pack_block, &it);
}

/* Unpacks tiles to codes int8 [N, K]. */
EXPORT void q8_unpack(const int8_t *tiles, int64_t rows, int64_t columns, int64_t steps, int threads, int8_t *codes) {
  struct packing it = {codes, (int8_t *)tiles, rows, columns, 0, steps, NULL};
  run_parallel(ceil_div(rows, BLOCK_N), threads, unpack_block, &it);
}

/* ---- the rotation of a weight ---- */

/* reference.rotate of values [R, K], in place. */
EXPORT void q8_rotate(float *values, int64_t rows, int64_t columns, int32_t size) {
  for (int64_t n = 0; n < rows; n++) rotate_row(values + n * columns, columns, size);
}
