// Tile kernels for any machine: vectors of four floats in the compiler's own words.
#include "tile_kernels.h"

#define INFOPO_ISA portable
#define INFOPO_NAME "portable"
#define INFOPO_LANES 4
#include "tile_kernels_impl.h"

namespace infopo {
const TileKernels* portable_kernels() { return &portable::kKernels; }
}  // namespace infopo
