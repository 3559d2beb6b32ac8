// Gradients with a pooled tail: per tile of vocabulary entries, columns of G that matter, and one for all the others.
//
//     K     = { v : p_tv >= threshold for some t of the chunk, or v is a label of the chunk }       T = the other words
//     pi_v  = sum_t p_tv / sum_{t, v' in T} p_tv'          gT_t = sum_{v in T} G_tv
//     dX_t += sum_{v in K} G_tv W_v + gT_t sum_{v in T} pi_v W_v
//     dW_v += sum_t G_tv X_t  for v in K;                  pi_v sum_t gT_t X_t  for v in T
//
// Each thread moves the kept rows of its tiles of G^T, and their pools, to the front of its part of the block. So a
// product of any format multiplies a tile with fewer rows. Rows of W for dX are gathered in the same order.
#pragma once

#include <cstdint>

#include "chunk.h"

namespace infopo {

// Forms the wanted results of a block [v0, v1). `hidden`: rows of dX, or null. `report`: of the call.
void pooled_gradient(const Chunk&, int64_t v0, int64_t v1, const Chunk::BlockGradient&, float* const* hidden,
                     const TailReport& report);

}  // namespace infopo
