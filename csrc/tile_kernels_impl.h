// The kernels of tile_kernels.h, compiled once per instruction set by the tile_kernels_*.cpp that include this file.
//
// Nothing of the C++ library is instantiated here: an inline function compiled for AVX-512 must never be the copy that
// the linker keeps for everyone.

#include "vec_math.h"
//
#include "rows.h"
#ifdef INFOPO_BF16_DOT
#include "products_bf16.h"
#else
#include "products_float32.h"
#endif
//
#include "passes.h"

namespace infopo::INFOPO_ISA {

constexpr TileKernels kKernels{INFOPO_NAME, kLanes, kGroup,  kPanel, kDepth,       pack_columns, pack_rows, multiply,
                               logits,      finish, exponentials, gradient, store_row, load_row};

}  // namespace infopo::INFOPO_ISA
