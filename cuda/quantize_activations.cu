// Quantizes activations to int8 with one scale per token, and lists the outlier columns, in one launch and without the
// host.
//
// Equal to quantize_activations of quantize8/kernels/reference.py: an element with |x| >= threshold gets code 0, is left
// out of its token's absmax, and adds its column to the list. Columns are marked in a bit mask, where order does not
// matter. The block that ends last turns the mask into an ascending list, so the list is the same on every run.
//
// With ROTATION, elements are rotated in blocks of that size as they are read, in both passes, and nothing is an outlier.
#include "quantize8.cuh"
#if ROTATION
#include "rotate.cuh"
#endif

constexpr int WARPS = THREADS / 32;

// Elements k..k+7 of a row as floats, rotated; zeros from `columns` on.
__device__ __forceinline__ void read_vector(const FLOAT* row, int k, int columns, float (&v)[VECTOR]) {
#if ROTATION
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) v[i] = 0.f;
  if (k < columns) load_vector(row + k, VECTOR, v);
  rotate_vector(v);
#else
  load_vector(row + k, columns - k, v);
#endif
}

// grid (tokens), THREADS threads. mask [ceil(columns / 32) + 1] must be zero before the call; its last word counts
// blocks. If mask is null, as it is with ROTATION, nothing is an outlier. outliers [columns] and count [1] receive the list.
extern "C" __global__ void __launch_bounds__(THREADS)
quantize_activations(const FLOAT* __restrict__ x, int8_t* __restrict__ codes, float* __restrict__ scale, uint32_t* mask,
                     int* outliers, int* count, float threshold, int columns) {
  __shared__ uint32_t peaks[WARPS];
  __shared__ bool is_last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t token = blockIdx.x;
  const FLOAT* source = x + token * columns;
  // With ROTATION all lanes of a warp exchange elements, so those past the end of the row take part.
  const int past_end = ROTATION ? lane * VECTOR : 0;

  uint32_t peak = 0;
#pragma unroll 2
  for (int k = threadIdx.x * VECTOR; k - past_end < columns; k += THREADS * VECTOR) {
    float v[VECTOR];
    uint32_t marks = 0;
    read_vector(source, k, columns, v);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const bool outlier = mask && fabsf(v[i]) >= threshold;  // false for NaN, which makes the scale of its token NaN
      marks |= (uint32_t)outlier << i;
      peak = outlier ? peak : max(peak, magnitude(v[i]));
    }
    if (marks) atomicOr(&mask[k >> 5], marks << (k & 31));
  }
  peak = warp_max(peak);
  if (lane == 0) peaks[warp] = peak;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) peak = max(peak, peaks[i]);
  const float inverse = inverse_of(peak);
  if (threadIdx.x == 0) scale[token] = scale_of(__uint_as_float(peak));
#pragma unroll 2
  for (int k = threadIdx.x * VECTOR; k - past_end < columns; k += THREADS * VECTOR) {
    float v[VECTOR];
    int8_t q[VECTOR];
    read_vector(source, k, columns, v);
    if (ROTATION && k >= columns) continue;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) q[i] = mask && fabsf(v[i]) >= threshold ? (int8_t)0 : code_of(v[i], inverse);
    store_codes(codes + token * columns + k, columns - k, q);
  }

  if (!mask) return;
  const int words = (columns + 31) / 32;
  if (threadIdx.x == 0) {
    __threadfence();  // this block's marks must be visible before its count
    is_last = atomicAdd(&mask[words], 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  int listed = 0;
  for (int first = 0; first < words; first += THREADS) {
    const int word = first + threadIdx.x;
    uint32_t bits = word < words ? __ldcg(&mask[word]) : 0;
    const int own = __popc(bits);
    int up_to_here = own;  // set bits up to this lane, within the warp
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int before = __shfl_up_sync(ALL_LANES, up_to_here, d);
      if (lane >= d) up_to_here += before;
    }
    __syncthreads();  // peaks can be reused
    if (lane == 31) peaks[warp] = up_to_here;
    __syncthreads();
    int place = listed + up_to_here - own;
    for (int i = 0; i < WARPS; ++i) {
      if (i < warp) place += peaks[i];
      listed += peaks[i];
    }
    for (; bits; bits &= bits - 1) outliers[place++] = word * 32 + __ffs((int)bits) - 1;
  }
  if (threadIdx.x == 0) *count = listed;
}
