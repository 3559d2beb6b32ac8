#include "chunk.h"

#include "pooled_tail.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace infopo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace

Chunk::Chunk(const TileKernels& kernels, const Head& head, const int64_t* labels, int64_t n, const Want& want)
    : k(kernels),
      p(head),
      sizes(require_sizes(kernels, head, n, want)),
      arena_(bytes_of(kernels, head, sizes, want)),
      b(arena_, kernels, head, sizes, want),
      want_(want),
      labels_(labels) {}

void Chunk::load(const int64_t* chunk_rows, int64_t n, const int64_t* chunk_slots) {
  if (chunk_rows == rows) return;
  rows = chunk_rows;
  live = n;
  C = round_up(n, k.lanes);
  runs_.clear();
  for (int64_t c = 0; chunk_slots && c < live; ++c) {
    if (c > 0 && chunk_slots[c] == chunk_slots[c - 1] + 1) {
      ++runs_.back().n;
    } else {
      runs_.push_back({.c = c, .slot = chunk_slots[c], .n = 1});
    }
  }
  for (int64_t c = 0; c < C; ++c) b.labels[c] = c < live ? labels_[rows[c]] : kIgnoreIndex;
  const int64_t panels = ceil_div(live, k.panel);
  on_threads(sizes.threads, [&](int64_t t) {
    const Range own = part(panels, sizes.threads, t), own_rows = part(live, sizes.threads, t, k.block);
    if (runs_.empty()) k.pack_columns(p.hidden, rows, live, p.H, own.begin, own.end, b.columns);
    if (want_.rows_panels) k.pack_rows(p.hidden, rows, 0, own_rows.begin, own_rows.end, live, p.H, b.rows);
  });
}

void Chunk::load_weights(const float* row_weight, const float* lse) const {
  for (int64_t c = 0; c < C; ++c) {
    b.coefficient[c] = c < live ? -p.map.scale * row_weight[rows[c]] : 0;
    if (lse || c >= live) b.lse[c] = c < live ? lse[rows[c]] : kInfinity;
    if (p.tail_threshold > 0 && b.coefficient[c] == 0) b.lse[c] = kInfinity;  // its p is 0: the row keeps no word
  }
}

void Chunk::reset_reduction() const {
  std::fill_n(b.max, sizes.threads * C, -kInfinity);
  std::fill_n(b.sum, sizes.threads * C, 0.0);
  for (int64_t c = 0; c < C; ++c) b.target[c] = b.labels[c] == kElsewhere ? 0 : kNaN;  // NaN: outside the vocabulary
}

void Chunk::pick_targets(const Tile& tile) const {
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = b.labels[c] - tile.v0;
    if (v >= 0 && v < tile.rows) b.target[c] = tile.z[v * tile.ld + c];
  }
}

// If all logits are -inf, so is lse. If one is +inf, s is NaN.
void Chunk::write_logprob(int64_t c, double m, double s, float* l, float* lse) const {
  const double value = m + std::log(s);
  lse[rows[c]] = b.lse[c] = static_cast<float>(value);
  l[rows[c]] = static_cast<float>(b.target[c] - value);
}

void Chunk::merge_threads(float* l, float* lse) const {
  for (int64_t c = 0; c < live; ++c) {
    double m = -kInfinity, s = 0;
    for (int64_t t = 0; t < sizes.threads; ++t) m = std::max(m, static_cast<double>(max(t)[c]));
    for (int64_t t = 0; t < sizes.threads; ++t) {
      const double s_t = sum(t)[c];
      if (s_t != 0) s += s_t * std::exp(max(t)[c] - m);
    }
    write_logprob(c, m, s, l, lse);
  }
}

// Copies the tile's logits to slots first ... first + live - 1 of the store. The tile starts a group of the store.
void Chunk::keep(const Tile& tile, int64_t t, const LogitStore& store, int64_t first) const {
  float* const reference = scratch(t);
  if (store.reference) {
    for (int64_t c = 0; c < live; ++c) reference[c] = std::isfinite(max(t)[c]) ? max(t)[c] : 0;
    for (int64_t v = tile.v0; v < tile.v0 + tile.rows; v += LogitStore::kGroup) {
      std::copy_n(reference, live, store.references(v) + first);
    }
  }
  for (int64_t v = 0; v < tile.rows; ++v) {
    store.for_parts(tile.v0 + v, first, live, [&](char* to, int64_t at, int64_t n) {
      const float* z = tile.z + v * tile.ld + at;
      if (store.reference) {
        k.narrow_logits(z, reference + at, n, reinterpret_cast<uint16_t*>(to));
      } else {
        std::memcpy(to, z, n * sizeof(float));
      }
    });
  }
}

// Copies them back. Padded columns become 0, because their memory may hold anything, and 0 times NaN is NaN.
void Chunk::take_back(const Tile& tile, int64_t t, const LogitStore& store) const {
  float* const reference = scratch(t);
  for (int64_t v = 0; v < tile.rows; ++v) {
    float* to = tile.z + v * tile.ld;
    if (store.reference && (v == 0 || (tile.v0 + v) % LogitStore::kGroup == 0)) {
      for (const auto& [c, slot, n] : runs_) {
        std::copy_n(store.references(tile.v0 + v) + slot, n, reference + c);
      }
    }
    for (const Run& run : runs_) {
      store.for_parts(tile.v0 + v, run.slot, run.n, [&](const char* from, int64_t at, int64_t n) {
        const int64_t c = run.c + at;
        if (store.reference) {
          k.widen_logits(reinterpret_cast<const uint16_t*>(from), reference + c, n, to + c);
        } else {
          std::memcpy(to + c, from, n * sizeof(float));
        }
      });
    }
    std::fill(to + live, to + C, 0.f);
  }
}

void Chunk::reduce(float* l, float* lse, const LogitStore& store, int64_t first) const {
  reset_reduction();
  on_threads(sizes.threads, [&](int64_t t) {
    const int64_t align = store.reference ? LogitStore::kGroup : k.row_group;
    for_own_tiles(t, 0, p.V, want_.all_logits ? b.z : nullptr, align, k.tile, [&](const Tile& tile) {
      k.logits(p.weight, b.columns, p.H, tile, stage(t));
      k.finish(p.map, tile, max(t), sum(t));
      pick_targets(tile);
      if (store.exists()) keep(tile, t, store, first);
      k.exponentials(p.map, tile, max(t), sum(t), false, nullptr);
    });
  });
  merge_threads(l, lse);
}

void Chunk::form_logits(const Tile& tile, int64_t t, const BlockGradient& to) const {
  if (!runs_.empty()) {
    take_back(tile, t, to.store);
  } else if (!to.have_logits) {
    k.logits(p.weight, b.columns, p.H, tile, stage(t));
    k.finish(p.map, tile, nullptr, nullptr);
  }
}

void Chunk::weight_gradient(int64_t v0, int64_t v1, const BlockGradient& to) {
  on_threads(sizes.threads, [&](int64_t t) {
    for_own_tiles(t, v0, v1, to.z, [&](const Tile& tile) {
      form_logits(tile, t, to);
      k.gradient(p.map, tile, live, b.labels, b.lse, b.coefficient, to.db, scratch(t));
      if (to.dW) {
        float* out[kMostTileRows];
        for (int64_t v = 0; v < tile.rows; ++v) out[v] = to.dW + (tile.v0 - v0 + v) * p.H;
        k.multiply({.M = tile.rows,
                    .N = p.H,
                    .K = live,
                    .a = tile.z,
                    .lda = tile.ld,
                    .b = b.rows,
                    .b_rows = live,
                    .out = out,
                    .accumulate = to.add,
                    .task_end = product_tasks(k, tile.rows, p.H)});
      }
      if (packed_ != v0) pack_weight(tile, v0, v1);
    });
  });
  packed_ = v0;
}

void Chunk::gradients(int64_t v0, int64_t v1, const BlockGradient& to, float* const* hidden, const TailReport& report) {
  if (p.tail_threshold > 0) return pooled_gradient(*this, v0, v1, to, hidden, report);
  weight_gradient(v0, v1, to);
  if (hidden) hidden_gradient(v0, v1, to.z, hidden);
}

void Chunk::pack_weight(const Tile& tile, int64_t v0, int64_t v1) const {
  if (b.weight) {
    k.pack_rows(p.weight, nullptr, v0, tile.v0 - v0, tile.v0 - v0 + tile.rows, v1 - v0, p.H, b.weight);
  }
}

void Chunk::hidden_gradient(int64_t v0, int64_t v1, const float* z, float* const* out) const {
  const int64_t tasks = product_tasks(k, live, p.H);
  on_threads(sizes.threads, [&](int64_t t) {
    const Range own = part(tasks, sizes.threads, t);
    k.multiply({.M = live,
                .N = p.H,
                .K = v1 - v0,
                .a = z,
                .lda = b.ld,
                .a_by_column = true,
                .b = b.weight ? b.weight : static_cast<const float*>(p.weight.data) + v0 * p.weight.stride,
                .ldb = b.weight ? 0 : p.weight.stride,
                .b_rows = v1 - v0,
                .out = out,
                .accumulate = true,
                .task_begin = own.begin,
                .task_end = own.end});
  });
}

}  // namespace infopo
