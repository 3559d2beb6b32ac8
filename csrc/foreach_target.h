// Includes INFOPO_TARGET_SOURCE once for each instruction set, compiled for that set and in its own namespace.
//
// The target is set here, not on the command line. So only the included source is compiled for more than the baseline,
// and headers that were included before can be shared safely. The included source uses these macros:
//
//   INFOPO_ISA        name of the instruction set, and of the namespace
//   INFOPO_LANES      number of floats in a vector
//   INFOPO_PRODUCTS   the header with the products
//   INFOPO_BF16       1 if the products take pairs of bfloat16; for bfloat16 inputs only

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 warns about its own AVX-512 intrinsics: they have an undefined operand, which nothing reads.
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

// Any machine: vectors of four floats by the compiler's vector extensions.
#define INFOPO_ISA portable
#define INFOPO_LANES 4
#define INFOPO_PRODUCTS "products_float32.h"
#define INFOPO_BF16 0
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
#undef INFOPO_PRODUCTS
#undef INFOPO_BF16
INFOPO_END_TARGET

INFOPO_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16")
#define INFOPO_ISA avx512_bf16
#define INFOPO_PRODUCTS "products_bf16.h"
#define INFOPO_BF16 1
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_PRODUCTS
INFOPO_END_TARGET

INFOPO_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#define INFOPO_ISA amx
#define INFOPO_PRODUCTS "products_amx.h"
#include INFOPO_TARGET_SOURCE
#undef INFOPO_ISA
#undef INFOPO_LANES
INFOPO_END_TARGET

#endif

#undef INFOPO_PRODUCTS
#undef INFOPO_BF16
