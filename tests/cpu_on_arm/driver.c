/* Runs the kernels on a case from a file, so that a library for another processor can be tested under an emulator.
 *
 *     driver CASE RESULT
 *
 * CASE: int64 {rows of x, out features, in features, wide columns, exact columns, dtype, mode, threads,
 * rotation}, float32 threshold; then codes int8 [N, K], absmax / 127 float32 [N / 32, 32], x [M, K], codes of x int8 [M, K], wide int64 [J],
 * codes of wide columns int8 [N, J], second digits int8 [N, E], a weight float32 [N, K].
 * RESULT: out [M, N], sums int32 [M, N] of the codes, codes int8 [N, K] and absmax float32 [N] of the weight, and the
 * units that the processor has, int32.
 */
#include <stdio.h>

#include "../../cpu/detect.c"
#include "../../cpu/ggml.c"
#include "../../cpu/linear.c"
#include "../../cpu/weights.c"
#include "../../cpu/threads.c"

static void *take(FILE *file, size_t bytes) {
  void *room = calloc(bytes + 64, 1);
  if (!room || fread(room, 1, bytes, file) != bytes) exit(2);
  return room;
}

int main(int count, char **names) {
  if (count != 3) return 2;
  FILE *file = fopen(names[1], "rb");
  if (!file) return 2;
  int64_t *n = take(file, 9 * 8), M = n[0], N = n[1], K = n[2], J = n[3], E = n[4];
  float threshold = *(float *)take(file, 4);
  int64_t blocks = ceil_div(N, BLOCK_N), bytes = n[5] == FLOAT32 ? 4 : 2;
  int8_t *codes = take(file, (size_t)(N * K));
  float *scale = take(file, (size_t)(blocks * BLOCK_N * 4));
  void *x = take(file, (size_t)(M * K * bytes));
  int8_t *x_codes = take(file, (size_t)(M * K));
  int64_t *wide = take(file, (size_t)(J * 8));
  int8_t *apart_codes = take(file, (size_t)(N * J)), *second = take(file, (size_t)(N * E));
  float *weight = take(file, (size_t)(N * K * 4));

  int64_t own_steps = ceil_div(K, STEP_K), steps = own_steps + ceil_div(E, STEP_K), high_steps = ceil_div(J, STEP_K);
  int8_t *tiles = calloc((size_t)(blocks * steps * STEP_BYTES + 1), 1);
  int8_t *plain = calloc((size_t)(blocks * own_steps * STEP_BYTES + 1), 1);
  int8_t *apart = calloc((size_t)(blocks * high_steps * STEP_BYTES + 1), 1);
  int32_t *sums[3];
  for (int i = 0; i < 3; i++) sums[i] = calloc((size_t)(blocks * BLOCK_N), 4);
  q8_pack(codes, N, K, 0, steps, (int)n[7], tiles, sums[0]);
  q8_pack(second, N, E, own_steps, steps, (int)n[7], tiles, sums[0]);
  q8_pack(codes, N, K, 0, own_steps, (int)n[7], plain, sums[1]);
  q8_pack(apart_codes, N, J, 0, high_steps, (int)n[7], apart, sums[2]);
  int8_t *again = malloc((size_t)(N * K + 1));
  q8_unpack(tiles, N, K, steps, (int)n[7], again);
  if (memcmp(again, codes, (size_t)(N * K))) return 3;

  char *out = calloc((size_t)(M * N * bytes + 1), 1);
  int32_t *products = calloc((size_t)(M * N + 1), 4);
  struct q8_linear call = {x, out, tiles, scale, sums[0], NULL, wide, apart, sums[2], M, K, N, J, E,
                           threshold, (int32_t)n[5], (int32_t)n[6], (int32_t)n[7], (int32_t)n[8]};
  if (q8_linear(&call) || q8_multiply(x_codes, M, K, plain, sums[1], N, (int)n[7], products)) return 4;

  float *absmax = malloc((size_t)N * 4 + 4), *peaks = calloc((size_t)K, 4);
  double *squares = calloc((size_t)K, 8), *errors = calloc((size_t)K, 8);
  int64_t *outliers = calloc((size_t)K, 8);
  if (q8_quantize_rows(FLOAT32, weight, N, K, 0, again, absmax, peaks, squares, errors, outliers)) return 5;

  int32_t units = q8_units();
  file = fopen(names[2], "wb");
  if (!file) return 2;
  fwrite(out, (size_t)bytes, (size_t)(M * N), file);
  fwrite(products, 4, (size_t)(M * N), file);
  fwrite(again, 1, (size_t)(N * K), file);
  fwrite(absmax, 4, (size_t)N, file);
  fwrite(&units, 4, 1, file);
  return fclose(file) ? 2 : 0;
}
