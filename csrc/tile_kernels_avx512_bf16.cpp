// Tile kernels for x86-64 with AVX-512-BF16, for bfloat16 inputs. The target stands here, not on the command line: only what follows it is
// compiled for more than the baseline, so headers stay safe to share.
#include "tile_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a variable that someone reads.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,avx512bf16")
#endif

#define INFOPO_ISA avx512_bf16
#define INFOPO_NAME "avx512_bf16"
#define INFOPO_LANES 16
#define INFOPO_BF16_DOT
#include "tile_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace infopo {
const TileKernels* avx512_bf16_kernels() { return &avx512_bf16::kKernels; }
}  // namespace infopo

#else

namespace infopo {
const TileKernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace infopo

#endif
