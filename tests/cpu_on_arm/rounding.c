/* Runs the kernels of GPTQ's codes on a case from a file, as driver.c does with the others.
 *
 *     rounding CASE RESULT
 *
 * CASE: int64 {tokens, features, out features, groups}; then x float32 [T, K], a weight float32 [N, K], scales [N, G], and
 * the order int64 [K]. RESULT: the Gram matrix float64 [K, K], its factor float32 [K, K], and codes int8 [N, K]. The factor
 * is that of the Gram matrix with 1 added to its diagonal, in the matrix's own order.
 */
#include <stdio.h>

#include "../../cpu/rounding.c"
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
  int64_t *n = take(file, 4 * 8), T = n[0], K = n[1], N = n[2], G = n[3];
  float *x = take(file, (size_t)(T * K * 4)), *weight = take(file, (size_t)(N * K * 4));
  float *scales = take(file, (size_t)(N * G * 4));
  int64_t *order = take(file, (size_t)(K * 8));
  double *gram = calloc((size_t)(K * K), 8);
  int8_t *codes = calloc((size_t)(N * K), 1);
  if (q8_accumulate(gram, x, T, K, 2)) return 3;
  file = fopen(names[2], "wb");
  if (!file) return 2;
  fwrite(gram, 8, (size_t)(K * K), file);
  for (int64_t i = 0; i < K; i++) gram[i * K + i] += 1;
  if (q8_factor(gram, K, 2) || q8_round_codes(weight, scales, order, (float *)gram, N, K, G, 2, codes)) return 3;
  fwrite(gram, 4, (size_t)(K * K), file);
  fwrite(codes, 1, (size_t)(N * K), file);
  return fclose(file) ? 2 : 0;
}
