// The three primitives. Each chooses the schedule for the wanted results.
#include <cstring>
#include <vector>

#include "chunk.h"
#include "schedules.h"

namespace infopo {
namespace {

std::vector<int64_t> scored_rows(const Head& p, const int64_t* labels) {
  std::vector<int64_t> rows;
  rows.reserve(p.N);
  for (int64_t t = 0; t < p.N; ++t) {
    if (labels[t] != kIgnoreIndex) rows.push_back(t);
  }
  return rows;
}

// Whether `backward` has no room for float32 sums of dX for that many rows. Then it forms dX and dW one after the
// other.
bool sums_too_large(const Head& p, int64_t rows) {
  return p.hidden.dtype != Dtype::kFloat32 && rows * p.H * static_cast<int64_t>(sizeof(float)) > p.workspace_bytes / 3;
}

// Sets dX of scored rows of weight 0 to 0: `backward` does not touch them.
void clear_weightless(const Head& p, const std::vector<int64_t>& rows, const float* row_weight, void* dX) {
  const Dtype dtype = p.hidden.dtype;
  for (const int64_t t : rows) {
    if (row_weight[t] == 0) std::memset(result_row(dX, dtype, t, p.H), 0, p.H * element_size(dtype));
  }
}

}  // namespace

int64_t kept_rows(const Head& p, const Gradients& to) {
  const Dtype weight_gradient = to.weight_dtype;
  // With dX and dW one after the other, a row takes five products and a kept row three; without keeping, each takes
  // four.
  const bool apart = weight_gradient != Dtype::kFloat32 && sums_too_large(p, p.N);
  // What `backward` needs for large chunks stays free, and sums of dX that fit now still fit.
  int64_t reserve = std::min(p.workspace_bytes / 2, int64_t{16} << 20);
  if (p.hidden.dtype != Dtype::kFloat32 && !apart) {
    const int64_t sums = p.N * p.H * static_cast<int64_t>(sizeof(float));
    reserve = std::max(reserve + sums, 3 * sums);
  }
  const int64_t numbers = std::max(int64_t{0}, p.workspace_bytes - reserve) / 2;
  const TileKernels& k = select_kernels(p.hidden.dtype);
  if (k.packed_bytes == 2 && !LogitStore::narrow_holds(p.map)) return 0;
  const int64_t slots = LogitStore::in(k, nullptr, weight_gradient, p.V, p.H, nullptr, numbers).all_slots();
  if (slots < kFewestKeptRows || (apart && 2 * slots <= p.N)) return 0;
  Head rest = p;
  rest.workspace_bytes -= 2 * LogitStore::numbers_beside(k, weight_gradient, p.V, p.H, std::min(slots, p.N));
  const bool fits = p.N == 0 || (from_lse_fits(k, rest, apart ? to.without_hidden() : to, p.N) &&
                                 (!apart || from_lse_fits(k, rest, {.hidden = to.hidden}, p.N)));
  return fits ? slots : 0;
}

void logprob(const Head& p, const int64_t* labels, const LogitStore& keep, float* l, float* lse) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  const std::vector<int64_t> rows = scored_rows(p, labels);
  if (rows.empty()) return;
  Chunk chunk(k, p, labels, static_cast<int64_t>(rows.size()), {.own_tiles = true, .reduce = true});
  if (keep.data) keep.populate(p.V, chunk.sizes.threads);
  for_chunks(chunk, rows, [&](int64_t first) { chunk.reduce(l, lse, keep, first); });
}

void logprob_and_grad(const Head& p, const int64_t* labels, const float* row_weight, const Gradients& to, float* l,
                      float* lse) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  const std::vector<int64_t> rows = scored_rows(p, labels);
  if (rows.empty()) return;
  const bool weight_side = to.weight || to.bias;
  const bool adds_in_place = !to.weight || to.weight_dtype == Dtype::kFloat32, pools = p.tail_threshold > 0;
  if ((weight_side || pools) && adds_in_place && stored_logits_fit(k, p, static_cast<int64_t>(rows.size()), to)) {
    return from_stored_logits(k, p, labels, rows, row_weight, to, l, lse);
  }
  if (pools &&
      weight_side) {  // one pass would not know which words to keep; two have the logits twice, and little else
    logprob(p, labels, {}, l, lse);
    if (to.hidden) clear_weightless(p, rows, row_weight, to.hidden);
    return backward(p, labels, lse, row_weight, to, {});
  }
  if (pools) {  // every word is kept
    for (const int64_t t : rows) {
      if (to.tail.mass && row_weight[t] != 0) to.tail.mass[t] = 0;
    }
    for (int i = 0; to.tail.columns && i < 2; ++i) to.tail.columns[i] += static_cast<double>(p.V);
  }
  if (to.hidden) {
    hidden_from_one_pass(k, p, labels, rows, row_weight, to.hidden, l, lse);
  } else {
    logprob(p, labels, {}, l, lse);
  }
  if (weight_side) backward(p, labels, lse, row_weight, to.without_hidden(), {});
}

void backward(const Head& p, const int64_t* labels, const float* lse, const float* row_weight, const Gradients& to,
              const Kept& kept) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  LiveRows rows;
  rows.store = kept.store;
  int64_t slot = 0;
  for (int64_t t = 0; t < p.N; ++t) {
    const bool is_kept = kept.any && kept.labels[t] != kIgnoreIndex;
    if (labels[t] != kIgnoreIndex && row_weight[t] != 0) {
      if (is_kept) rows.slots.push_back(slot);
      (is_kept ? rows.kept : rows.others).push_back(t);
    }
    slot += is_kept;
  }
  if (rows.count() == 0 || !(to.hidden || to.weight || to.bias)) {
    if (kept.any) std::memset(to.weight, 0, p.V * p.H * element_size(to.weight_dtype));
    return;
  }
  const bool both = to.hidden && (to.weight || to.bias);
  if (both && sums_too_large(p, rows.count())) {
    from_lse(k, p, labels, rows, lse, row_weight, {.hidden = to.hidden, .tail = to.tail}, false);
    from_lse(k, p, labels, rows, lse, row_weight, to.without_hidden(), kept.any);
    return;
  }
  from_lse(k, p, labels, rows, lse, row_weight, to, kept.any);
}

}  // namespace infopo
