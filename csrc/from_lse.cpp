// Gradients for a known logsumexp. Logits are formed again, or taken from the store that kept them. A block of the
// vocabulary is finished for all rows before the next block begins,
//
//     for each block:  for each chunk:  Z^T = W X^T -> G^T,   dW_block += G^T X,   dX_chunk += G W_block
//
// so that each entry of dW is rounded once. Without dW and db the outer loop goes over the rows.
#include <algorithm>
#include <vector>

#include "chunk.h"
#include "hidden_sums.h"
#include "schedules.h"
#include "threads.h"

namespace infopo {
namespace {

// Calls f(first) for each chunk; `first` is the position of the chunk's first row among all rows.
template <typename F>
void for_chunks(Chunk& chunk, const LiveRows& rows, const F& f) {
  const int64_t kept = static_cast<int64_t>(rows.kept.size());
  for_chunks(chunk, rows.kept, f, rows.slots);
  for_chunks(chunk, rows.others, [&](int64_t first) { f(kept + first); });
}

Want backward_want(const Head& p, const Gradients& to, int64_t n, bool rows_outside) {
  const bool sums_in_workspace = to.hidden && p.hidden.dtype != Dtype::kFloat32;
  return {.own_tiles = p.tail_threshold > 0,
          .block = true,
          .rows_panels = to.weight != nullptr,
          .weight_rows = to.hidden != nullptr,
          .hidden_rows = sums_in_workspace && rows_outside,
          .all_hidden_rows = sums_in_workspace && !rows_outside ? n : 0,
          .weight_block = to.weight && to.weight_dtype != Dtype::kFloat32,
          .tail = p.tail_threshold > 0};
}

}  // namespace

bool from_lse_fits(const TileKernels& k, const Head& p, const Gradients& to, int64_t n) {
  Sizes sizes{};
  Want want = backward_want(p, to, n, !to.weight && !to.bias);
  want.weight_block |= to.weight != nullptr;
  return find_sizes(k, p, n, want, sizes);
}

void from_lse(const TileKernels& k, const Head& p, const int64_t* labels, const LiveRows& rows, const float* lse,
              const float* row_weight, const Gradients& to, bool assign) {
  const int64_t n = rows.count(), H = p.H;
  const bool rows_outside = !to.weight && !to.bias;
  Want want = backward_want(p, to, n, rows_outside);
  const int64_t kept = static_cast<int64_t>(rows.kept.size());
  // A tile may write its rows of dW only when the logits in their memory are no longer needed. If the first chunk holds
  // all kept rows, this is so after that chunk.
  want.weight_block |= to.weight && kept > kMostRows;
  if (to.weight && kept > 0 && !want.weight_block) want.weight_block = require_sizes(k, p, n, want).C < kept;
  Chunk chunk(k, p, labels, n, want);
  HiddenSums sums(chunk, to.hidden);
  const auto step = [&](int64_t v0, int64_t v1, int64_t first, float* dW, bool add) {
    chunk.load_weights(row_weight, lse);
    chunk.gradients(v0, v1,
                    {.z = chunk.b.z, .have_logits = false, .dW = dW, .add = add, .db = to.bias, .store = rows.store},
                    to.hidden ? sums.rows(first) : nullptr, to.tail);
  };
  if (rows_outside) {
    for_chunks(chunk, rows, [&](int64_t) {
      sums.clear(0);
      for_blocks(chunk, [&](int64_t v0, int64_t v1) { step(v0, v1, 0, nullptr, true); });
      sums.round_into_result(0);
    });
    return;
  }
  for_blocks(chunk, [&](int64_t v0, int64_t v1) {
    float* dW = nullptr;
    if (want.weight_block) {
      dW = chunk.b.weight_sum;
    } else if (to.weight) {
      dW = static_cast<float*>(to.weight) + v0 * H;
    }
    for_chunks(chunk, rows, [&](int64_t first) {
      if (to.hidden && v0 == 0) sums.clear(first);
      step(v0, v1, first, dW, first > 0 || !(assign || want.weight_block));
      if (to.hidden && v1 == p.V) sums.round_into_result(first);
    });
    if (!want.weight_block) return;
    on_threads(chunk.sizes.threads, [&](int64_t t) {
      const Range own = part(v1 - v0, chunk.sizes.threads, t);
      for (int64_t v = own.begin; v < own.end; ++v) {
        k.store_row(dW + v * H, H, !assign, to.weight_dtype, result_row(to.weight, to.weight_dtype, v0 + v, H));
      }
    });
  });
}

}  // namespace infopo
