/* GPTQ's choice of int8 codes: Gram matrices of inputs, their triangular factors, and codes (kernels/rounding.py).
 *
 * Each function equals its definition in quantize8/kernels/rounding.py bit for bit, on every unit and with any number of
 * threads: every number is summed in one order, whatever the sizes of tiles. Products of float32 and float64 numbers are
 * rounded before they are added, as not every unit has fused operations; products of two bfloat16 numbers are exact.
 *
 * The inner loop of each function is the same: a few rows of sums, as many columns as two registers hold, and a loop
 * over the terms. What it reads is copied before, so that it lies in the order in which it is read: matrices whose rows
 * are a power of two apart would otherwise throw each other out of the nearest cache.
 */
#include "vectors.h"

#define HEIGHT (LANES == 16 ? 8 : 4)  /* rows of sums in registers */
#define STRIP (2 * LANES)             /* columns of float32 sums in registers; LANES of float64 */
#define SQUARE 64                     /* features in a block, and weight rows that are rounded together */

typedef double doubles __attribute__((vector_size(4 * LANES)));

INLINE doubles load_doubles(const double *place) {
  doubles values;
  memcpy(&values, place, sizeof values);
  return values;
}

INLINE void *aligned(size_t nbytes, void **room) { /* room: what to free */
  *room = malloc(nbytes + 64);
  return *room ? (void *)(((uintptr_t)*room + 63) & ~(uintptr_t)63) : NULL;
}

/* ---- accumulate ---- */

#define TOKENS 128          /* float32 sums over so many tokens, float64 sums over these */
#define TOKENS_AT_ONCE 1024 /* tokens whose copy is in memory */
#define GRAM_ROWS 128       /* rows of the Gram matrix that a thread takes at a time */
#define LEAST_INPUT 0x1p-60f

struct gram {
  const float *x;       /* tokens of [T, K] */
  float *strips;        /* [K / STRIP][tokens][STRIP], zeros at the edge */
  double *gram;         /* [K, K] */
  int64_t tokens, columns, bands; /* bands: of GRAM_ROWS rows */
};

static void copy_strip(void *context, int64_t item) {
  const struct gram *job = context;
  int64_t first = item * STRIP, here = job->columns - first < STRIP ? job->columns - first : STRIP;
  float *place = job->strips + item * job->tokens * STRIP;
  for (int64_t t = 0; t < job->tokens; t++, place += STRIP) {
    const float *row = job->x + t * job->columns + first;
    for (int64_t k = 0; k < STRIP; k++) place[k] = k < here && fabsf(row[k]) >= LEAST_INPUT ? row[k] : 0;
  }
}

INLINE void sum_tokens(const float *left, const float *right, int64_t tokens, float *out) {
  floats sums[HEIGHT][2] = {0};
  for (int64_t t = 0; t < tokens; t++, left += STRIP, right += STRIP) {
    floats first = load_floats(right), second = load_floats(right + LANES);
    for (int i = 0; i < HEIGHT; i++) {
      floats factor = left[i] - (floats){0};
      sums[i][0] = fma_(factor, first, sums[i][0]);
      sums[i][1] = fma_(factor, second, sums[i][1]);
    }
  }
  memcpy(out, sums, sizeof sums);
}

static void add_band(void *context, int64_t item) { /* a strip of columns of a band of rows, unless below the diagonal */
  const struct gram *job = context;
  int64_t strip = item / job->bands, top = item % job->bands * GRAM_ROWS, first = strip * STRIP;
  int64_t width = job->columns - first < STRIP ? job->columns - first : STRIP;
  int64_t bottom = top + GRAM_ROWS < first + width ? top + GRAM_ROWS : first + width;
  float sums[HEIGHT * STRIP];
  for (int64_t start = 0; start < job->tokens; start += TOKENS) {
    int64_t tokens = job->tokens - start < TOKENS ? job->tokens - start : TOKENS;
    const float *right = job->strips + (strip * job->tokens + start) * STRIP;
    for (int64_t i = top; i < bottom; i += HEIGHT) {
      const float *left = job->strips + (i / STRIP * job->tokens + start) * STRIP + i % STRIP;
      sum_tokens(left, right, tokens, sums);
      for (int64_t r = 0; r < HEIGHT && i + r < job->columns; r++) {
        double *row = job->gram + (i + r) * job->columns + first;
        if (width == STRIP) for (int64_t k = 0; k < STRIP; k++) row[k] += (double)sums[r * STRIP + k];
        else for (int64_t k = 0; k < width; k++) row[k] += (double)sums[r * STRIP + k];
      }
    }
  }
}

/* Upper triangle of gram [K, K] += that of x^T x, of x [T, K] with bfloat16 numbers. Returns -1 if out of memory. */
EXPORT int q8_accumulate(double *gram, const float *x, int64_t tokens, int64_t columns, int threads) {
  int64_t strips = ceil_div(columns, STRIP), most = tokens < TOKENS_AT_ONCE ? tokens : TOKENS_AT_ONCE;
  void *room;
  float *copy = aligned((size_t)(strips * STRIP * most) * 4, &room);
  if (!copy) return -1;
  for (int64_t start = 0; start < tokens; start += TOKENS_AT_ONCE) {
    int64_t here = tokens - start < TOKENS_AT_ONCE ? tokens - start : TOKENS_AT_ONCE;
    struct gram job = {x + start * columns, copy, gram, here, columns, ceil_div(columns, GRAM_ROWS)};
    run_parallel(strips, threads, copy_strip, &job);
    run_parallel(strips * job.bands, threads, add_band, &job);
  }
  free(room);
  return 0;
}

/* ---- factor ---- */

struct cholesky {
  double *matrix;  /* [K, K] */
  int64_t columns, first, count; /* of the block of columns that is being factored */
  double *strips;  /* [first / LANES][count][LANES]: R of the rows above, transposed, from the block's last column on */
  double corner[SQUARE][SQUARE]; /* R of the block itself */
};

static void factor_corner(struct cholesky *job) {
  double column[SQUARE];
  for (int64_t r = 0; r < job->count; r++)
    memcpy(job->corner[r], job->matrix + (job->first + r) * job->columns + job->first, (size_t)job->count * 8);
  for (int64_t c = job->count - 1; c >= 0; c--) {
    double root = job->corner[c][c] = sqrt(job->corner[c][c]);
    for (int64_t r = 0; r < c; r++) column[r] = job->corner[r][c] /= root;
    for (int64_t r = 0; r < c; r++)
      for (int64_t l = r; l < c; l++) job->corner[r][l] -= column[r] * column[l];
  }
  for (int64_t r = 0; r < job->count; r++)
    memcpy(job->matrix + (job->first + r) * job->columns + job->first, job->corner[r], (size_t)job->count * 8);
}

static void factor_rows(void *context, int64_t item) { /* SQUARE rows above the corner */
  const struct cholesky *job = context;
  double turned[SQUARE][SQUARE] __attribute__((aligned(64)));
  double *rows = job->matrix + item * SQUARE * job->columns + job->first;
  for (int64_t r = 0; r < SQUARE; r++)
    for (int64_t c = 0; c < job->count; c++) turned[c][r] = rows[r * job->columns + c];
  for (int64_t c = job->count - 1; c >= 0; c--) {
    double root = job->corner[c][c];
    for (int64_t r = 0; r < SQUARE; r++) turned[c][r] /= root;
    for (int64_t l = 0; l < c; l++) {
      double factor = job->corner[l][c];
      for (int64_t r = 0; r < SQUARE; r++) turned[l][r] -= turned[c][r] * factor;
    }
  }
  for (int64_t r = 0; r < SQUARE; r++)
    for (int64_t c = 0; c < job->count; c++) rows[r * job->columns + c] = turned[c][r];
  double *strip = job->strips + item * SQUARE * job->count;
  for (int64_t first = 0; first < SQUARE; first += LANES)
    for (int64_t c = job->count - 1; c >= 0; c--, strip += LANES) memcpy(strip, turned[c] + first, LANES * 8);
}

INLINE void subtract_products(double *place, int64_t stride, const double *left, const double *right, int64_t count) {
  doubles sums[HEIGHT][2];
  for (int i = 0; i < HEIGHT; i++)
    for (int v = 0; v < 2; v++) sums[i][v] = load_doubles(place + i * stride + v * LANES / 2);
  for (int64_t k = 0; k < count; k++, left += LANES, right += LANES) {
    doubles first = load_doubles(right), second = load_doubles(right + LANES / 2);
    for (int i = 0; i < HEIGHT; i++) {
      doubles factor = left[i] - (doubles){0};
      sums[i][0] -= factor * first;
      sums[i][1] -= factor * second;
    }
  }
  for (int i = 0; i < HEIGHT; i++)
    for (int v = 0; v < 2; v++) memcpy(place + i * stride + v * LANES / 2, &sums[i][v], sizeof(doubles));
}

static void subtract_square(void *context, int64_t item) { /* a block of columns of a block of rows, unless below */
  const struct cholesky *job = context;
  int64_t blocks = job->first / SQUARE, across = item / blocks * SQUARE, down = item % blocks * SQUARE;
  if (down > across) return;
  for (int64_t j = across; j < across + SQUARE; j += LANES)
    for (int64_t i = down; i < down + SQUARE && i < j + LANES; i += HEIGHT) {
      const double *left = job->strips + i / LANES * LANES * job->count + i % LANES;
      subtract_products(job->matrix + i * job->columns + j, job->columns, left, job->strips + j * job->count,
                        job->count);
    }
}

/* Writes the factor in float32 [K, K] over the float64 matrix: row i ends before row i + 1 of the matrix starts. */
static void normalize(double *matrix, int64_t columns, double *row, double *roots) {
  for (int64_t i = 0; i < columns; i++) roots[i] = matrix[i * columns + i];
  for (int64_t i = 0; i < columns; i++) {
    memcpy(row, matrix + i * columns, (size_t)columns * 8);
    float *narrow = (float *)row; /* each number is read before its place is overwritten */
    for (int64_t j = 0; j < columns; j++) {
      double value;
      memcpy(&value, (char *)row + 8 * j, 8);
      float ratio = j < i ? 0 : (float)(j == i ? value : value / roots[j]);
      memcpy((char *)narrow + 4 * j, &ratio, 4);
    }
    memcpy((char *)matrix + 4 * i * columns, narrow, (size_t)columns * 4);
  }
}

/* Replaces a matrix H [K, K], given by its upper triangle, by float32 [K, K]: R_ij / R_jj above the diagonal, R_jj on it,
 * where H = R R^T and R is upper triangular. Returns -1 if out of memory. */
EXPORT int q8_factor(double *matrix, int64_t columns, int threads) {
  void *room;
  struct cholesky job = {matrix, columns, 0, 0, NULL, {{0}}};
  job.strips = aligned((size_t)(columns * (SQUARE + 2)) * 8, &room);
  if (!job.strips) return -1;
  for (int64_t block = ceil_div(columns, SQUARE) - 1; block >= 0; block--) {
    job.first = block * SQUARE;
    job.count = columns - job.first < SQUARE ? columns - job.first : SQUARE;
    factor_corner(&job);
    run_parallel(block, threads, factor_rows, &job);
    run_parallel(block * block, threads, subtract_square, &job);
  }
  normalize(matrix, columns, job.strips, job.strips + columns);
  free(room);
  return 0;
}

/* ---- round_codes ---- */

#define TERMS 256 /* features whose part of the factor is copied at a time: with SQUARE outputs, 64 KiB */

struct rounding {
  const float *weight, *scales;  /* [N, K], [N, G] */
  const int64_t *order;          /* [K] */
  const float *factor;           /* [K, K] */
  int8_t *codes;                 /* [N, K] */
  int64_t rows, columns, groups;
  int failed;
};

/* Of SQUARE rows of the weight, with features in the order of rounding; each [K][SQUARE] unless said otherwise. */
struct rows {
  float *weight, *errors, *nearest;    /* errors: w - code * scale, as chosen and with the nearest codes */
  float *scales, *inverses;            /* [G][SQUARE]; both 0 where a scale cannot be used */
  int8_t *codes;
  float terms[TERMS][SQUARE];          /* a part of the factor: features, and the block's features */
  float carry[SQUARE][SQUARE], near_carry[SQUARE][SQUARE]; /* the block's features: sums of errors times factors */
  float squares[SQUARE], near_squares[SQUARE];             /* squared output errors */
};

INLINE floats select_floats(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }

/* The codes of targets; NaN has the code -127, and everything the code 0 where the inverse of the scale is 0. */
INLINE floats codes_of(floats targets, floats inverses) {
  floats scaled = targets * inverses, limit = 127.0f - (floats){0};
  scaled = select_floats(scaled > -limit, scaled, -limit);
  scaled = select_floats(scaled < limit, scaled, limit);
  return (floats)((ints)((scaled + ROUNDER) - ROUNDER) & (inverses != 0));
}

static void read_rows(const struct rounding *job, int64_t first, struct rows *rows) {
  for (int64_t r = 0; r < SQUARE; r++) {
    int inside = first + r < job->rows;
    const float *row = job->weight + (first + r) * job->columns, *scales = job->scales + (first + r) * job->groups;
    for (int64_t g = 0; g < job->groups; g++) {
      float scale = inside ? scales[g] : 0, inverse = 1.0f / scale;
      int usable = fabsf(scale) < INFINITY && fabsf(inverse) < INFINITY;
      rows->scales[g * SQUARE + r] = usable ? scale : 0;
      rows->inverses[g * SQUARE + r] = usable ? inverse : 0;
    }
    for (int64_t j = 0; j < job->columns; j++) rows->weight[j * SQUARE + r] = inside ? row[job->order[j]] : 0;
  }
}

static void round_to_nearest(const struct rounding *job, struct rows *rows) {
  for (int64_t j = 0; j < job->columns; j++) {
    int64_t group = job->order[j] / (job->columns / job->groups) * SQUARE;
    for (int r = 0; r < SQUARE; r += LANES) {
      floats weight = load_floats(rows->weight + j * SQUARE + r);
      floats codes = codes_of(weight, load_floats(rows->inverses + group + r));
      floats errors = weight - codes * load_floats(rows->scales + group + r);
      memcpy(rows->nearest + j * SQUARE + r, &errors, sizeof errors);
    }
  }
}

/* carry[j][rows] += the sum over `count` features i, in order, of terms[i][j] times errors[i][rows]. */
INLINE void add_carry(float (*carry)[SQUARE], const float (*terms)[SQUARE], const float *errors, int64_t count) {
  for (int j = 0; j < SQUARE; j += HEIGHT)
    for (int r = 0; r < SQUARE; r += STRIP) {
      floats sums[HEIGHT][2];
      for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < 2; v++) sums[i][v] = load_floats(carry[j + i] + r + v * LANES);
      for (int64_t t = 0; t < count; t++) {
        floats first = load_floats(errors + t * SQUARE + r), second = load_floats(errors + t * SQUARE + r + LANES);
        for (int i = 0; i < HEIGHT; i++) {
          floats factor = terms[t][j + i] - (floats){0};
          sums[i][0] += factor * first;
          sums[i][1] += factor * second;
        }
      }
      for (int i = 0; i < HEIGHT; i++) memcpy(carry[j + i] + r, sums[i], sizeof sums[i]);
    }
}

static void carry_into(const struct rounding *job, struct rows *rows, int64_t first, int64_t count) {
  memset(rows->carry, 0, sizeof rows->carry);
  memset(rows->near_carry, 0, sizeof rows->near_carry);
  memset(rows->terms, 0, sizeof rows->terms);
  for (int64_t start = 0; start < first; start += TERMS) {
    int64_t here = first - start < TERMS ? first - start : TERMS;
    for (int64_t t = 0; t < here; t++)
      memcpy(rows->terms[t], job->factor + (start + t) * job->columns + first, (size_t)count * 4);
    add_carry(rows->carry, rows->terms, rows->errors + start * SQUARE, here);
    add_carry(rows->near_carry, rows->terms, rows->nearest + start * SQUARE, here);
  }
}

INLINE void add_square(float *squares, floats errors, const float *carry, float root) {
  floats part = (errors + load_floats(carry)) * root, sum = load_floats(squares) + part * part;
  memcpy(squares, &sum, sizeof sum);
}

/* Chooses the codes of a feature, adds to the errors' squares, and carries the errors to the block's other features. */
static void round_feature(const struct rounding *job, struct rows *rows, int64_t feature, int64_t at, int64_t count) {
  const float *factor = job->factor + feature * job->columns + feature - at;
  int64_t group = job->order[feature] / (job->columns / job->groups) * SQUARE;
  for (int r = 0; r < SQUARE; r += LANES) {
    int64_t place = feature * SQUARE + r;
    floats weight = load_floats(rows->weight + place), near = load_floats(rows->nearest + place);
    floats codes = codes_of(weight + load_floats(rows->carry[at] + r), load_floats(rows->inverses + group + r));
    floats errors = weight - codes * load_floats(rows->scales + group + r);
    memcpy(rows->errors + place, &errors, sizeof errors);
    for (int i = 0; i < LANES; i++) rows->codes[place + i] = (int8_t)codes[i];
    add_square(rows->squares + r, errors, rows->carry[at] + r, factor[at]);
    add_square(rows->near_squares + r, near, rows->near_carry[at] + r, factor[at]);
    for (int64_t j = at + 1; j < count; j++) {
      floats sum = load_floats(rows->carry[j] + r) + factor[j] * errors;
      floats near_sum = load_floats(rows->near_carry[j] + r) + factor[j] * near;
      memcpy(rows->carry[j] + r, &sum, sizeof sum);
      memcpy(rows->near_carry[j] + r, &near_sum, sizeof near_sum);
    }
  }
}

static void write_codes(const struct rounding *job, const struct rows *rows, int64_t first) {
  for (int64_t r = 0; r < SQUARE && first + r < job->rows; r++) {
    int8_t *codes = job->codes + (first + r) * job->columns;
    int better = rows->squares[r] <= rows->near_squares[r];
    for (int64_t j = 0; j < job->columns; j++) {
      int64_t group = job->order[j] / (job->columns / job->groups) * SQUARE;
      if (better) codes[job->order[j]] = rows->codes[j * SQUARE + r];
      else {
        floats weight = rows->weight[j * SQUARE + r] - (floats){0};
        codes[job->order[j]] = (int8_t)codes_of(weight, rows->inverses[group + r] - (floats){0})[0];
      }
    }
  }
}

static void round_rows(void *context, int64_t item) {
  struct rounding *job = context;
  size_t whole = (size_t)job->columns * SQUARE, scales = (size_t)job->groups * SQUARE;
  void *room;
  struct rows *rows = aligned(sizeof *rows + 4 * (3 * whole + 2 * scales) + whole, &room);
  if (!rows) {
    __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  rows->weight = (float *)(rows + 1);
  rows->errors = rows->weight + whole;
  rows->nearest = rows->errors + whole;
  rows->scales = rows->nearest + whole;
  rows->inverses = rows->scales + scales;
  rows->codes = (int8_t *)(rows->inverses + scales);
  memset(rows->squares, 0, sizeof rows->squares);
  memset(rows->near_squares, 0, sizeof rows->near_squares);
  read_rows(job, item * SQUARE, rows);
  round_to_nearest(job, rows);
  for (int64_t first = 0; first < job->columns; first += SQUARE) {
    int64_t count = job->columns - first < SQUARE ? job->columns - first : SQUARE;
    carry_into(job, rows, first, count);
    for (int64_t at = 0; at < count; at++) round_feature(job, rows, first + at, at, count);
  }
  write_codes(job, rows, item * SQUARE);
  free(room);
}

/* Codes [N, K] of a weight [N, K] with scales [N, G], by the order [K] and the factor [K, K] of q8_factor. Returns -1 if
 * out of memory. */
EXPORT int q8_round_codes(const float *weight, const float *scales, const int64_t *order, const float *factor,
                          int64_t rows, int64_t columns, int64_t groups, int threads, int8_t *codes) {
  struct rounding job = {weight, scales, order, factor, codes, rows, columns, groups, 0};
  run_parallel(ceil_div(rows, SQUARE), threads, round_rows, &job);
  return job.failed ? -1 : 0;
}
