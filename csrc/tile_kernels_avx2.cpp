// Tile kernels for x86-64 with AVX2 with FMA. The target stands here, not on the command line: only what follows it is
// compiled for more than the baseline, so headers stay safe to share.
#include "tile_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define INFOPO_ISA avx2
#define INFOPO_NAME "avx2"
#define INFOPO_LANES 8
#include "tile_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace infopo {
const TileKernels* avx2_kernels() { return &avx2::kKernels; }
}  // namespace infopo

#else

namespace infopo {
const TileKernels* avx2_kernels() { return nullptr; }
}  // namespace infopo

#endif
