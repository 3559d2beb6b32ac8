// A chunk of C rows in the workspace, and what is done to it: every step of the schedules, in parallel over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "linear_logprob.h"
#include "logit_store.h"
#include "threads.h"
#include "tile_kernels.h"
#include "workspace.h"

namespace infopo {

// One call: sizes, buffers, and the chunk of rows that the buffers hold at the moment.
class Chunk {
 public:
  // `n`: rows of all chunks together.
  Chunk(const TileKernels& kernels, const Head& head, const int64_t* labels, int64_t n, const Want& want);

  const TileKernels& k;
  const Head& p;
  const Sizes sizes;

 private:
  Arena arena_;

 public:
  const Buffers b;
  const int64_t* rows = nullptr;   // [live] rows of X in this chunk
  int64_t live = 0;                // of them
  int64_t C = 0;                   // live rounded up to whole vectors
  const int64_t* slots = nullptr;  // [live] where the store has their logits, ascending; or null

  // Pack chunk_rows[0 ... n) unless they are what is packed already.
  void load(const int64_t* chunk_rows, int64_t n, const int64_t* chunk_slots);

  // The chunk's row weights and, for a given logsumexp, that. Padded columns weigh nothing, whatever their logits.
  void load_weights(const float* row_weight, const float* lse) const;

  // f(tile of vocabulary entries) for each tile of [v0, v1) that is thread t's
  template <typename F>
  void for_own_tiles(int64_t t, int64_t v0, int64_t v1, float* z, const F& f) const {
    const Range own = part(v1 - v0, sizes.threads, t, k.row_group);
    for (int64_t v = own.begin; v < own.end; v += kTile) {
      f(Tile{.z = z ? z + v * b.ld : b.tiles + t * kTile * b.ld,
             .ld = b.ld,
             .rows = std::min(kTile, own.end - v),
             .C = C,
             .v0 = v0 + v});
    }
  }

  // What thread t has for itself.
  float* scratch(int64_t t) const { return b.scratch + t * 2 * C; }
  float* stage(int64_t t) const { return b.stage ? b.stage + t * kTile * k.depth : nullptr; }
  float* max(int64_t t) const { return b.max + t * C; }
  double* sum(int64_t t) const { return b.sum + t * C; }

  void reset_reduction() const;
  void pick_targets(const Tile&) const;

  // l and lse of the chunk's row c, from the largest logit m and s = sum_v exp(z_v - m).
  void write_logprob(int64_t c, double m, double s, float* l, float* lse) const;

  // Logits of the whole vocabulary, reduced to l and lse of the chunk's rows; kept [V, C] if the workspace has them, or
  // in slots first ... of the store.
  void reduce(float* l, float* lse, const LogitStore& store = {}, int64_t first = 0) const;

  // What is wanted of a block of vocabulary entries [v0, v1): dW and db of each tile while it is warm, panels of W.
  struct BlockGradient {
    float* z;                 // of the block; G afterwards
    bool have_logits;         // z holds them already
    float* dW;                // of the block, or null
    bool add;                 // to dW; else it is assigned
    float* db;                // of the whole vocabulary, or null
    const LogitStore& store;  // where logits are taken from if the chunk has slots there
  };
  void weight_gradient(int64_t v0, int64_t v1, const BlockGradient&) const;

  void pack_weight(const Tile&, int64_t v0, int64_t v1) const;

  // out[c] += sum_v z[v][c] W[v] over a block (its panels packed, or W as it stands).
  void hidden_gradient(int64_t v0, int64_t v1, const float* z, float* const* out) const;

 private:
  void merge_threads(float* l, float* lse) const;
  void keep(const Tile&, const LogitStore&, int64_t first) const;
  void take_back(const Tile&, const LogitStore&) const;

  const Want want_;
  const int64_t* labels_;
};

// f(first) for each chunk; `slots` are those of the rows in a store, if they have some.
template <typename F>
void for_chunks(Chunk& chunk, const std::vector<int64_t>& rows, const F& f, const std::vector<int64_t>& slots = {}) {
  const int64_t n = static_cast<int64_t>(rows.size());
  if (n == 0) return;
  const int64_t C = even_size(n, chunk.sizes.C, chunk.k.lanes);
  for (int64_t first = 0; first < n; first += C) {
    chunk.load(rows.data() + first, std::min(C, n - first), slots.empty() ? nullptr : slots.data() + first);
    f(first);
  }
}

// f(v0, v1) for each block of the vocabulary
template <typename F>
void for_blocks(const Chunk& chunk, const F& f) {
  for (int64_t v0 = 0; v0 < chunk.p.V; v0 += chunk.sizes.Vb) f(v0, std::min(chunk.p.V, v0 + chunk.sizes.Vb));
}

}  // namespace infopo
