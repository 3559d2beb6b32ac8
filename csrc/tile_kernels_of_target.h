// The kernels of tile_kernels.h for one instruction set. foreach_target.h includes this file once for each set, so it
// has no include guard.
//
// This file uses no templates or inline functions of the C++ library: the linker keeps one copy of an inline function
// for the whole library, and this must never be a copy compiled for AVX-512.

#include "vectors.h"
//
#include "rows.h"
#include INFOPO_PRODUCTS
#if INFOPO_BF16
#include "pairs_bf16.h"
#endif
//
#include "passes.h"
#include "tail.h"

#define INFOPO_TEXT_OF(name) #name
#define INFOPO_TEXT(name) INFOPO_TEXT_OF(name)

namespace infopo::INFOPO_ISA {

constexpr TileKernels kKernels{.name = INFOPO_TEXT(INFOPO_ISA),
                               .tile = kTile,
                               .lanes = kColumns,
                               .row_group = kGroup,
                               .panel = kPanel,
                               .stage = kStage,
                               .block = kBlock,
                               .packed_bytes = kPackedBytes,
                               .most_block = kMostBlock,
                               .fewest_stored_rows = kFewestStoredRows,
                               .pack_columns = pack_columns,
                               .pack_rows = pack_rows,
                               .multiply = multiply,
                               .logits = logits,
                               .finish = finish,
                               .exponentials = exponentials,
                               .gradient = gradient,
                               .pool = pool,
                               .settle = settle,
                               .tail_mean = tail_mean,
                               .spread_tail = spread_tail,
                               .narrow_logits = narrow_logits,
                               .widen_logits = widen_logits,
                               .store_row = store_row,
                               .load_row = load_row};

}  // namespace infopo::INFOPO_ISA

#undef INFOPO_TEXT
#undef INFOPO_TEXT_OF
