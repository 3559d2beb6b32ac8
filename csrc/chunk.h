// A chunk of C rows in the workspace, and every step that the schedules take with it, in parallel over threads.
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

// The state of a call: sizes, buffers, and the chunk of rows that the buffers hold now.
class Chunk {
 public:
  // `n`: number of rows in all chunks together.
  Chunk(const TileKernels& kernels, const Head& head, const int64_t* labels, int64_t n, const Want& want);

  const TileKernels& k;
  const Head& p;
  const Sizes sizes;

 private:
  Arena arena_;

 public:
  const Buffers b;
  const int64_t* rows = nullptr;  // [live] indices of the chunk's rows in X
  int64_t live = 0;               // number of rows
  int64_t C = 0;                  // live rounded up to whole vectors

  // Packs chunk_rows[0 ... n), unless they are packed already. `chunk_slots`, if given, are the slots of their logits in
  // a store, ascending.
  void load(const int64_t* chunk_rows, int64_t n, const int64_t* chunk_slots);

  // The logits of row c are in slot c of the store.
  void take_from_store() { runs_ = {{.c = 0, .slot = 0, .n = live}}; }

  // Loads the chunk's row weights, and its logsumexp if one is given. Padded columns get weight 0, whatever their
  // logits.
  void load_weights(const float* row_weight, const float* lse) const;

  // Calls f(tile of vocabulary entries) for each tile of [v0, v1) that belongs to thread t.
  template <typename F>
  void for_own_tiles(int64_t t, int64_t v0, int64_t v1, float* z, const F& f) const {
    for_own_tiles(t, v0, v1, z, k.row_group, k.tile, f);
  }

  // The same for tiles of `most` entries; threads have parts of whole multiples of `align` entries.
  template <typename F>
  void for_own_tiles(int64_t t, int64_t v0, int64_t v1, float* z, int64_t align, int64_t most, const F& f) const {
    const Range own = part(v1 - v0, sizes.threads, t, align);
    for (int64_t v = own.begin; v < own.end; v += most) {
      f(Tile{.z = z ? z + v * b.ld : b.tiles + t * k.tile * b.ld,
             .ld = b.ld,
             .rows = std::min(most, own.end - v),
             .C = C,
             .v0 = v0 + v,
             .by_column = want_.weight_rows});
    }
  }

  // The buffers of thread t alone.
  float* scratch(int64_t t) const { return b.scratch + t * 2 * C; }
  float* stage(int64_t t) const { return b.stage ? b.stage + t * k.tile * k.stage : nullptr; }
  float* max(int64_t t) const { return b.max + t * C; }
  double* sum(int64_t t) const { return b.sum + t * C; }

  void reset_reduction() const;
  void pick_targets(const Tile&) const;

  // l and lse of the chunk's row c, from the largest logit m and s = sum_v exp(z_v - m).
  void write_logprob(int64_t c, double m, double s, float* l, float* lse) const;

  // Forms the logits of the whole vocabulary and reduces them to l and lse of the chunk's rows. Keeps them as [V, C] if
  // the workspace has room for that, or in the store from slot `first` on.
  void reduce(float* l, float* lse, const LogitStore& store = {}, int64_t first = 0) const;

  // The wanted results of a block of vocabulary entries [v0, v1): dW and db of each tile while the tile is in the
  // cache, and panels of W.
  struct BlockGradient {
    float* z;                 // of the block; G afterwards
    bool have_logits;         // z already holds logits
    float* dW;                // of the block, or null
    bool add;                 // add to dW; else assign it
    float* db;                // of the whole vocabulary, or null
    const LogitStore& store;  // source of the logits if the chunk has slots there
  };
  // The logits of a tile of the block: taken from the store, formed, or there already.
  void form_logits(const Tile&, int64_t t, const BlockGradient&) const;

  void weight_gradient(int64_t v0, int64_t v1, const BlockGradient&);

  // `weight_gradient` and, if `hidden` is given, `hidden_gradient`; with a pooled tail if the head has a threshold.
  void gradients(int64_t v0, int64_t v1, const BlockGradient&, float* const* hidden, const TailReport&);

  void pack_weight(const Tile&, int64_t v0, int64_t v1) const;

  // out[c] += sum_v z[v][c] W[v] over a block (from packed panels, or from W in place).
  void hidden_gradient(int64_t v0, int64_t v1, const float* z, float* const* out) const;

 private:
  void merge_threads(float* l, float* lse) const;
  void keep(const Tile&, int64_t t, const LogitStore&, int64_t first) const;
  void take_back(const Tile&, int64_t t, const LogitStore&) const;

  // Rows c ... c + n - 1 have slots slot ... slot + n - 1.
  struct Run {
    int64_t c, slot, n;
  };

  const Want want_;
  const int64_t* labels_;
  std::vector<Run> runs_;
  int64_t packed_ = -1;  // the block whose panels of W `weight_gradient` packed; the next chunk needs the same
};

// Calls f(first) for each chunk; `slots` are the rows' slots in a store, if they have any.
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

// Calls f(v0, v1) for each block of the vocabulary.
template <typename F>
void for_blocks(const Chunk& chunk, const F& f) {
  for (int64_t v0 = 0; v0 < chunk.p.V; v0 += chunk.sizes.Vb) f(v0, std::min(chunk.p.V, v0 + chunk.sizes.Vb));
}

}  // namespace infopo
