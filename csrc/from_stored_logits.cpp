// The logits of a chunk stay in the workspace as [V, C], become G in place, and give dW, db and dX:
//
//     Z^T = W X^T        dW += G^T X        db += G^T 1        dX = G W
//
// With a pooled tail, kernels that round G to 16 bits store 16-bit logits (logit_store.h): a chunk has
// twice the rows, and W is read half as often.
#include <algorithm>
#include <vector>

#include "chunk.h"
#include "hidden_sums.h"
#include "schedules.h"

namespace infopo {
namespace {

constexpr int kTileRegisterRows = 32;  // `block` of the kernels with tile registers

Want stored_logits_want(const TileKernels& k, const Head& p, const Gradients& to) {
  const bool narrow = p.tail_threshold > 0 && k.packed_bytes == 2 && LogitStore::narrow_holds(p.map);
  return {.own_tiles = narrow,
          .block = narrow,
          .all_logits = !narrow,
          .narrow_logits = narrow,
          .rows_panels = to.weight != nullptr,
          .weight_rows = to.hidden != nullptr,
          .reduce = true,
          .hidden_rows = to.hidden && p.hidden.dtype != Dtype::kFloat32,
          .tail = p.tail_threshold > 0};
}

}  // namespace

bool stored_logits_fit(const TileKernels& k, const Head& p, int64_t rows, const Gradients& to) {
  // Products in tile registers are so fast that reading stored logits takes longer than forming them again (Emerald
  // Rapids, 512 rows, H 576, V 49152, pooled tail, float32 dW: 0.20 s against 0.10 s).
  if (p.tail_threshold > 0 && k.block == kTileRegisterRows) return false;
  Sizes sizes{};
  return find_sizes(k, p, rows, stored_logits_want(k, p, to), sizes) &&
         sizes.C >= std::min(rows, int64_t{k.fewest_stored_rows});
}

void from_stored_logits(const TileKernels& k, const Head& p, const int64_t* labels, const std::vector<int64_t>& rows,
                        const float* row_weight, const Gradients& to, float* l, float* lse) {
  Chunk chunk(k, p, labels, static_cast<int64_t>(rows.size()), stored_logits_want(k, p, to));
  HiddenSums sums(chunk, to.hidden);
  for_chunks(chunk, rows, [&](int64_t) {
    const LogitStore& store = chunk.b.store;
    chunk.reduce(l, lse, store);
    if (store.exists()) chunk.take_from_store();
    chunk.load_weights(row_weight, nullptr);
    if (to.hidden) sums.clear(0);
    for_blocks(chunk, [&](int64_t v0, int64_t v1) {
      float* z = chunk.b.z + (store.exists() ? 0 : v0 * chunk.b.ld);
      float* dW = to.weight ? static_cast<float*>(to.weight) + v0 * p.H : nullptr;
      chunk.gradients(v0, v1,
                      {.z = z, .have_logits = !store.exists(), .dW = dW, .add = true, .db = to.bias, .store = store},
                      to.hidden ? sums.rows(0) : nullptr, to.tail);
    });
    if (to.hidden) sums.round_into_result(0);
  });
}

}  // namespace infopo
