// Runs CUDA kernels on a CPU, to test their results without a GPU. It says nothing about speed.
//
// A CUDA thread is a fiber; blocks run one after another. A fiber runs until it has to wait for others, at a barrier or
// a warp collective, and then the next one goes on, in an order that a test chooses: a result that changes with the
// order needs a barrier. Misuse ends the launch with a message: collectives that a warp reaches apart, barriers that
// not all threads reach. Shared memory starts as poison, asynchronous copies land only when waited for, and a warpgroup
// product reads its operands only when waited for, so reading early gives wrong numbers.
// Not emulated: memory ordering between blocks, bank conflicts, time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static __attribute__((section("emulated_shared")))
#define DYNAMIC_SHARED(name) uint8_t* const name = emulator::dynamic_shared()

struct dim3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulator {
constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned char POISON = 0xCD;  // as float16 -22.8, as int8 -51, as float32 -4.3e8

// ---- fibers --------------------------------------------------------------------------------------------------------
#ifdef __x86_64__
extern "C" void emulator_switch(void** save, void* load);
__asm__(".text\n.type emulator_switch,@function\nemulator_switch:\n"
        " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n"
        " movq %rsi,%rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
struct Context {
  void* stack_pointer;
  void start(char* stack, void (*entry)()) {
    void** top = (void**)((uintptr_t)(stack + STACK_BYTES) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void*)entry;
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  void leave_for(Context& other) { emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void leave_for(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Warp {
  unsigned generation = 0, arrived = 0, mask = 0;
  const char* operation = "";
  alignas(16) unsigned char slots[2][32][64];  // what each lane brought; two, for lanes that are a collective ahead
};
struct Copy { void* to; const void* from; int group; };
struct Product { int* sums; uint64_t a, b; };
struct Fiber {
  Context context;
  char* stack;
  dim3 index;
  int lane;
  Warp* warp;
  bool done;
  const unsigned* waits_for;  // runs again when this generation has moved on from `seen`
  unsigned seen;
  std::vector<Copy> copies;
  int group;
  bool unfenced;  // copies landed since the last proxy fence
  std::vector<Product> products;
};
struct Block {
  dim3 index, threads, grid;
  void (*kernel)(void**);
  void** arguments;
  Fiber* current;
  Context host;
  int alive, at_barrier;
  unsigned barrier = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  char error[200];
};
inline Block block;

inline uint8_t* dynamic_shared() { return (uint8_t*)(((uintptr_t)block.shared.data() + 1023) & ~(uintptr_t)1023); }

inline void fail(const char* what, const char* why = "") {
  if (!block.error[0])
    snprintf(block.error, sizeof block.error, "%s%s%s in block (%u, %u), thread %u", what, *why ? ": " : "", why,
             block.index.x, block.index.y, block.current->index.x);
  block.current->context.leave_for(block.host);
}

inline void wait_for(const unsigned* generation) {
  block.current->waits_for = generation;
  block.current->seen = *generation;
  block.current->context.leave_for(block.host);
}

inline void run_kernel() {
  block.kernel(block.arguments);
  block.current->done = true;
  if (!block.current->copies.empty()) fail("an asynchronous copy is still pending at the end");
  if (!block.current->products.empty()) fail("a warpgroup product is still pending at the end");
  block.alive--;
  block.current->context.leave_for(block.host);
  abort();
}

// Each lane of the mask brings a value; returns the slots of all lanes once all have come.
template <class T> inline unsigned char (*exchange(unsigned mask, const T& value, const char* operation))[64] {
  static_assert(sizeof(T) <= 64, "");
  Fiber* fiber = block.current;
  Warp& warp = *fiber->warp;
  if (!(mask >> fiber->lane & 1)) fail(operation, "called by a lane outside its mask");
  if (warp.arrived && (warp.mask != mask || strcmp(warp.operation, operation)))
    fail(operation, "lanes of a warp are at different collectives");
  warp.mask = mask;
  warp.operation = operation;
  const unsigned parity = warp.generation & 1;
  memcpy(warp.slots[parity][fiber->lane], &value, sizeof value);
  warp.arrived |= 1u << fiber->lane;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    warp.generation++;
  } else {
    wait_for(&warp.generation);
  }
  return warp.slots[parity];
}
template <class T> inline T brought(unsigned char (*slots)[64], int lane) {
  T value;
  memcpy(&value, slots[lane], sizeof value);
  return value;
}

extern "C" unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

inline void prepare() {
  const int count = (int)block.threads.x;
  while ((int)block.fibers.size() < count) {
    block.fibers.emplace_back();
    block.fibers.back().stack = (char*)malloc(STACK_BYTES);
  }
  block.warps.assign((count + 31) / 32, Warp());
  block.alive = count;
  block.at_barrier = 0;
  block.error[0] = 0;
  memset(block.shared.data(), POISON, block.shared.size());
  if (__start_emulated_shared) memset(__start_emulated_shared, POISON, __stop_emulated_shared - __start_emulated_shared);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = {(unsigned)i, 0, 0};
    fiber.lane = i & 31;
    fiber.warp = &block.warps[i >> 5];
    fiber.done = fiber.unfenced = false;
    fiber.waits_for = nullptr;
    fiber.group = 0;
    fiber.copies.clear();
    fiber.products.clear();
    fiber.context.start(fiber.stack, run_kernel);
  }
}

// Whether there was anything for the fiber to do.
inline bool advance(Fiber& fiber) {
  if (fiber.done || block.error[0] || (fiber.waits_for && *fiber.waits_for == fiber.seen)) return false;
  fiber.waits_for = nullptr;
  block.current = &fiber;
  block.host.leave_for(fiber.context);
  return true;
}

// order: each thread in turn, 0 ascending, 1 descending, 2 pseudo-random and new every round; or 3, each warp as far as
// it gets before the next one, which finds barriers that keep a fast warp from overtaking a slow one.
inline bool run_block(int order) {
  prepare();
  const int count = (int)block.threads.x, warps = count / 32;
  uint32_t random = 12345u + block.index.x;
  while (block.alive) {
    bool moved = false;
    random = random * 1664525u + 1013904223u;
    for (int j = 0; j < count && order < 3; ++j) {
      const int from_end = count - 1 - j, shift = (int)(random >> 9) % count;
      const int i = order == 0 ? j : order == 1 ? from_end : ((random >> 8 & 1 ? from_end : j) + shift) % count;
      moved |= advance(block.fibers[i]);
    }
    for (int j = 0; j < warps && order == 3; ++j) {
      const int first = (int)((j + (random >> 9)) % warps) * 32;
      for (bool again = true; again; moved |= again) {
        again = false;
        for (int lane = 0; lane < 32; ++lane) again |= advance(block.fibers[first + lane]);
      }
    }
    if (block.error[0]) return false;
    if (block.alive && block.at_barrier == block.alive) {  // threads that have ended do not hold a barrier up
      block.at_barrier = 0;
      block.barrier++;
    } else if (!moved) {
      snprintf(block.error, sizeof block.error, "deadlock in block (%u, %u): %d of %d threads are at the barrier",
               block.index.x, block.index.y, block.at_barrier, block.alive);
      return false;
    }
  }
  return true;
}

template <class... A, size_t... I>
inline void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
template <class... A> inline void call(void (*kernel)(A...), void** arguments) {
  call_with(kernel, arguments, std::index_sequence_for<A...>());
}
}  // namespace emulator

#define EXPORT(kernel) extern "C" void kernel##_entry(void** arguments) { emulator::call(kernel, arguments); }

// As cuLaunchKernel takes it; blocks before `first_block` of the grid's x are left out. Returns null or what is wrong.
extern "C" const char* emulator_launch(void (*kernel)(void**), void** arguments, unsigned grid_x, unsigned grid_y,
                                       unsigned threads, unsigned shared_bytes, int order, unsigned first_block) {
  auto& block = emulator::block;
  block.kernel = kernel;
  block.arguments = arguments;
  block.grid = {grid_x, grid_y, 1};
  block.threads = {threads, 1, 1};
  block.shared.resize(shared_bytes + 1024);
  for (unsigned y = 0; y < grid_y; ++y)
    for (unsigned x = first_block; x < grid_x; ++x) {
      block.index = {x, y, 0};
      if (!emulator::run_block(order)) return block.error;
    }
  return nullptr;
}

// ---- what CUDA gives a kernel -----------------------------------------------------------------------------------------
#define threadIdx (emulator::block.current->index)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.threads)
#define gridDim (emulator::block.grid)

inline void __syncthreads() {
  emulator::block.at_barrier++;
  emulator::wait_for(&emulator::block.barrier);
}
inline void __syncwarp() { emulator::exchange(~0u, 0, "__syncwarp"); }
inline void __threadfence() {}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
  auto slots = emulator::exchange(mask, value, "__shfl_xor_sync");
  return emulator::brought<T>(slots, emulator::block.current->lane ^ distance);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, int distance) {
  auto slots = emulator::exchange(mask, value, "__shfl_up_sync");
  const int lane = emulator::block.current->lane - distance;
  return emulator::brought<T>(slots, lane >= 0 ? lane : lane + distance);
}
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T atomicAdd(T* p, T value) { const T old = *p; *p = old + value; return old; }
template <class T> inline T atomicOr(T* p, T value) { const T old = *p; *p = old | value; return old; }
template <class T> inline T atomicMax(T* p, T value) { const T old = *p; if (value > old) *p = value; return old; }
template <class To, class From> inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned u) { return bits_of<float>(u); }
inline unsigned __float_as_uint(float f) { return bits_of<unsigned>(f); }
inline float __fmul_rn(float a, float b) { return a * b; }  // built with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) {
  return x != x ? 0 : x >= 2147483648.f ? INT32_MAX : x < -2147483648.f ? INT32_MIN : (int)nearbyintf(x);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (unsigned)(uint8_t)(bytes >> 8 * (selector >> 4 * i & 7)) << 8 * i;
  return result;
}
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

// ---- stand-ins for the PTX of cuda/quantize8.cuh: the same names, the same meaning -------------------------------------
struct half { uint16_t bits; };
struct bfloat16 { uint16_t bits; };
inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
inline float to_float(half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.f : 1.f) * ldexpf((float)mantissa, -24);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
template <class T> inline T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <> inline half from_float<half>(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};  // 65520 and more
  if (magnitude < 0x38800000u)                                        // below 2^-14: steps of 2^-24
    return {(uint16_t)(sign | (uint32_t)nearbyintf(ldexpf(__uint_as_float(magnitude), 24)))};
  return {(uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13)};
}
inline uint32_t subtract_1152(uint32_t pair) {
  const half low = {(uint16_t)pair}, high = {(uint16_t)(pair >> 16)};
  return from_float<half>(to_float(low) - 1152.f).bits | (uint32_t)from_float<half>(to_float(high) - 1152.f).bits << 16;
}

struct Fragments { uint32_t a[4], b[2]; };
inline void mma(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  // m16n8k32, int8
  Fragments mine;
  memcpy(mine.a, a, 16);
  memcpy(mine.b, b, 8);
  auto slots = emulator::exchange(~0u, mine, "mma int8");
  const int lane = emulator::block.current->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
    for (int k = 0; k < 32; k += 4) {
      const auto* left = (const Fragments*)slots[(row & 7) * 4 + (k & 15) / 4];
      const auto* right = (const Fragments*)slots[column * 4 + (k & 15) / 4];
      const uint32_t p = left->a[(row >> 3) + 2 * (k >> 4)], q = right->b[k >> 4];
      for (int byte = 0; byte < 32; byte += 8) sums[i] += (int8_t)(p >> byte) * (int8_t)(q >> byte);
    }
  }
}
template <class T> inline void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  // m16n8k16
  Fragments mine;
  memcpy(mine.a, a, 16);
  memcpy(mine.b, b, 8);
  auto slots = emulator::exchange(~0u, mine, "mma 16-bit");
  const int lane = emulator::block.current->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
    double total = sums[i];
    for (int k = 0; k < 16; ++k) {
      const auto* left = (const Fragments*)slots[(row & 7) * 4 + (k & 7) / 2];
      const auto* right = (const Fragments*)slots[column * 4 + (k & 7) / 2];
      const T p = {(uint16_t)(left->a[(row >> 3) + 2 * (k >> 3)] >> 16 * (k & 1))};
      const T q = {(uint16_t)(right->b[k >> 3] >> 16 * (k & 1))};
      total += (double)to_float(p) * to_float(q);
    }
    sums[i] = (float)total;
  }
}
inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  auto slots = emulator::exchange(~0u, row, "ldmatrix");
  const int lane = emulator::block.current->lane;
  for (int j = 0; j < 4; ++j)
    memcpy(&fragments[j], (const char*)emulator::brought<const void*>(slots, j * 8 + lane / 4) + (lane & 3) * 4, 4);
}
inline void copy_async(void* to, const void* from, bool present) {
  memset(to, emulator::POISON, 16);
  emulator::block.current->copies.push_back({to, present ? from : nullptr, emulator::block.current->group});
}
inline void commit_copies() { emulator::block.current->group++; }
template <int PENDING> inline void wait_copies() {
  auto* fiber = emulator::block.current;
  std::vector<emulator::Copy> pending;
  for (auto& copy : fiber->copies) {
    if (copy.group >= fiber->group - PENDING) pending.push_back(copy);
    else if (copy.from) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
  }
  fiber->copies.swap(pending);
  fiber->unfenced = true;
}

// Hopper's warpgroup product: operands come from shared memory by descriptor (K-major, 128-byte swizzle).
inline uint32_t shared_address(const void* p) { return (uint32_t)((const uint8_t*)p - emulator::dynamic_shared()); }
inline void fence_async_proxy() { emulator::block.current->unfenced = false; }
inline void warpgroup_arrive() { __syncwarp(); }
inline void warpgroup_commit() { __syncwarp(); }
inline void warpgroup_mma(int (&sums)[128], uint64_t a, uint64_t b) {
  __syncwarp();
  if (emulator::block.current->unfenced) emulator::fail("wgmma", "no proxy fence since the copies landed");
  emulator::block.current->products.push_back({sums, a, b});
}
inline void operand_row(uint64_t descriptor, int row, int8_t (&bytes)[32]) {
  if (descriptor >> 62 != 1) emulator::fail("wgmma", "only the 128-byte swizzle is emulated");
  const uint32_t start = (uint32_t)(descriptor & 0x3FFF) * 16, groups = (uint32_t)(descriptor >> 32 & 0x3FFF) * 16;
  for (int k = 0; k < 32; k += 16) {
    const uint32_t linear = start + (row >> 3) * groups + (row & 7) * 128 + k;
    memcpy(bytes + k, emulator::dynamic_shared() + (linear ^ (linear >> 7 & 7) << 4), 16);
  }
}
inline void warpgroup_wait() {
  __syncwarp();
  const int thread = (int)threadIdx.x, lane = thread & 31;
  for (auto& product : emulator::block.current->products) {
    int8_t rows[2][32], columns[256][32];
    for (int half_tile = 0; half_tile < 2; ++half_tile)
      operand_row(product.a, (thread >> 5 & 3) * 16 + (lane >> 2) + 8 * half_tile, rows[half_tile]);
    for (int n = 0; n < 256; ++n)
      if ((n & 7) >> 1 == (lane & 3)) operand_row(product.b, n, columns[n]);
    for (int i = 0; i < 128; ++i) {
      const int8_t *p = rows[i >> 1 & 1], *q = columns[(i >> 2) * 8 + 2 * (lane & 3) + (i & 1)];
      int total = 0;
      for (int k = 0; k < 32; ++k) total += p[k] * q[k];
      product.sums[i] += total;
    }
  }
  emulator::block.current->products.clear();
}
