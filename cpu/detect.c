/* Detects which units this processor has and the system allows: one bit each, in the order of `enum unit`.
 *
 * Python calls this in the generic library, before it loads the library of a unit.
 */
#include "quantize8.h"

enum unit { AVX2 = 1, AVXVNNI = 2, AVX512VNNI = 4, AMX = 8, NEON_DOTPROD = 16, NEON_I8MM = 32 };

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define ARCH_REQ_XCOMP_PERM 0x1023 /* on Linux a process has to request the tile registers */
#define XFEATURE_XTILEDATA 18
static int may_use_tiles(void) { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0; }
#else
static int may_use_tiles(void) { return 0; }
#endif

static uint64_t saved_registers(void) { /* registers that the system saves on a thread switch (XCR0) */
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

EXPORT int q8_units(void) {
  uint32_t a, b, c, d, b7, c7, d7, a71 = 0, largest;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, OSXSAVE, AVX, F16C */
  if ((c & needed) != needed || !__get_cpuid_count(7, 0, &largest, &b7, &c7, &d7)) return 0;
  uint64_t saved = saved_registers();
  if ((saved & 0x6) != 0x6 || !(b7 & 1u << 5) || !(b7 & 1u << 8)) return 0; /* AVX2, BMI2 */
  if (largest >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  int units = AVX2;
  if (a71 & 1u << 4) units |= AVXVNNI;
  const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* F, DQ, CD, BW, VL */
  if ((saved & 0xE6) != 0xE6 || (b7 & avx512) != avx512 || !(c7 & 1u << 11)) return units;
  units |= AVX512VNNI;
  const uint32_t tiles = 1u << 24 | 1u << 25; /* AMX-TILE, AMX-INT8 */
  if ((d7 & tiles) == tiles && (saved & 0x60000) == 0x60000 && may_use_tiles()) units |= AMX;
  return units;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

EXPORT int q8_units(void) {
  return (getauxval(AT_HWCAP) & 1u << 20 ? NEON_DOTPROD : 0) | (getauxval(AT_HWCAP2) & 1u << 13 ? NEON_I8MM : 0);
}

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static int has(const char *name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}

EXPORT int q8_units(void) {
  return (has("hw.optional.arm.FEAT_DotProd") ? NEON_DOTPROD : 0) | (has("hw.optional.arm.FEAT_I8MM") ? NEON_I8MM : 0);
}

#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>

EXPORT int q8_units(void) {
  return IsProcessorFeaturePresent(43) ? NEON_DOTPROD : 0; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
}

#else
EXPORT int q8_units(void) { return 0; }
#endif
