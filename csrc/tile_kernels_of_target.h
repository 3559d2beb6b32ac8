// The kernels of tile_kernels.h for one instruction set; included once for each by foreach_target.h, so without a guard.
//
// Nothing of the C++ library is instantiated here: an inline function compiled for AVX-512 must never be the copy that
// the linker keeps for everyone.

#include "vectors.h"
//
#include "rows.h"
#if INFOPO_BF16_DOT
#include "products_bf16.h"
#else
#include "products_float32.h"
#endif
//
#include "passes.h"

#define INFOPO_TEXT_OF(name) #name
#define INFOPO_TEXT(name) INFOPO_TEXT_OF(name)

namespace infopo::INFOPO_ISA {

constexpr TileKernels kKernels{.name = INFOPO_TEXT(INFOPO_ISA),
                               .lanes = kLanes,
                               .row_group = kGroup,
                               .panel = kPanel,
                               .depth = kDepth,
                               .pack_columns = pack_columns,
                               .pack_rows = pack_rows,
                               .multiply = multiply,
                               .logits = logits,
                               .finish = finish,
                               .exponentials = exponentials,
                               .gradient = gradient,
                               .store_row = store_row,
                               .load_row = load_row};

}  // namespace infopo::INFOPO_ISA

#undef INFOPO_TEXT
#undef INFOPO_TEXT_OF
