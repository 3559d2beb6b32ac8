// Includes INFOPO_TARGET_SOURCE once for each instruction set, compiled for it and in a namespace of its own.
//
// The target stands here, not on the command line: only what is included is compiled for more than the baseline, so
// headers that were included before stay safe to share. What is included takes from here:
//
//   INFOPO_ISA        name of the instruction set, and of the namespace
//   INFOPO_LANES      floats of a vector
//   INFOPO_BF16_DOT   1 where pairs of bfloat16 are multiplied and added in one instruction, for bfloat16 inputs only

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a variable that someone reads.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define INFOPO_PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define INFOPO_BEGIN_TARGET(features) \
  INFOPO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define INFOPO_END_TARGET _Pragma("clang attribute pop")
#else
#define INFOPO_BEGIN_TARGET(features) _Pragma("GCC push_options") INFOPO_PRAGMA(GCC target features)
#define INFOPO_END_TARGET _Pragma("GCC pop_options")
#endif

// Any machine: vectors of four floats in the compiler's own words.
#define INFOPO_ISA portable
#define INFOPO_LANES 4
#define INFOPO_BF16_DOT 0
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_LANES

#if defined(__x86_64__)

INFOPO_BEGIN_TARGET("avx2,fma,f16c")
#define INFOPO_ISA avx2
#define INFOPO_LANES 8
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_LANES
INFOPO_END_TARGET

INFOPO_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define INFOPO_ISA avx512
#define INFOPO_LANES 16
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_BF16_DOT
INFOPO_END_TARGET

INFOPO_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16")
#define INFOPO_ISA avx512_bf16
#define INFOPO_BF16_DOT 1
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_LANES
INFOPO_END_TARGET

#endif

#undef INFOPO_BF16_DOT
