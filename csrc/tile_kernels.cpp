// The kernels of tile_kernels.h for every instruction set, from one source (tile_kernels_of_target.h).
#include "tile_kernels.h"

#define INFOPO_TARGET_SOURCE "tile_kernels_of_target.h"
#include "foreach_target.h"
