// dX alone from one pass: exponentials relative to a running reference r meet W before their sum is known,
//
//     u_t = sum_v exp(z_tv - r_t) s_tv W_v,   S_t = sum_v exp(z_tv - r_t),   dX_t = c_t scale (s_ty W_y - u_t / S_t),
//
// with s = dz/da / scale, as in attention with K = V = W; when r rises, u and S shrink by exp(old r - new r).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "chunk.h"
#include "hidden_sums.h"
#include "schedules.h"

namespace infopo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A running reference may lag behind the largest logit by this much before sums are rescaled: exp(16) is harmless.
constexpr float kLag = 16;

}  // namespace

void hidden_from_one_pass(const TileKernels& k, const Head& p, const int64_t* labels, const std::vector<int64_t>& rows,
                          const float* row_weight, void* dX, float* l, float* lse) {
  const bool sums_in_workspace = p.hidden.dtype != Dtype::kFloat32;
  const Want want{.block = true, .weight_rows = true, .reduce = true, .hidden_rows = sums_in_workspace};
  Chunk chunk(k, p, labels, static_cast<int64_t>(rows.size()), want);
  HiddenSums sums(chunk, dX);
  const Buffers& b = chunk.b;
  const int64_t threads = chunk.sizes.threads, H = p.H;
  for_chunks(chunk, rows, [&](int64_t) {
    sums.clear(0);
    float* const* u = sums.rows(0);
    chunk.reset_reduction();
    float* reference = b.lse;
    std::fill_n(reference, chunk.C, -kInfinity);
    std::fill_n(b.total, chunk.C, 0.0);
    for_blocks(chunk, [&](int64_t v0, int64_t v1) {
      on_threads(threads, [&](int64_t t) {
        chunk.for_own_tiles(t, v0, v1, b.z, [&](const Tile& tile) {
          k.logits(p.weight, b.columns, H, tile, chunk.stage(t));
          k.finish(p.map, tile, chunk.max(t), nullptr);
          chunk.pick_targets(tile);
          chunk.pack_weight(tile, v0, v1);
        });
      });
      sums.for_rows([&](int64_t c) {
        float most = -kInfinity;
        for (int64_t t = 0; t < threads; ++t) most = std::max(most, chunk.max(t)[c]);
        if (!(most > reference[c] + kLag)) return;
        const float shrink = std::exp(reference[c] - most);
        reference[c] = most;
        if (b.total[c] == 0) return;
        b.total[c] *= shrink;
        for (int64_t h = 0; h < H; ++h) u[c][h] *= shrink;
      });
      on_threads(threads, [&](int64_t t) {
        std::fill_n(chunk.sum(t), chunk.C, 0.0);
        chunk.for_own_tiles(t, v0, v1, b.z, [&](const Tile& tile) {
          k.exponentials(p.map, tile, reference, chunk.sum(t), true, chunk.scratch(t));
        });
      });
      for (int64_t t = 0; t < threads; ++t) {
        for (int64_t c = 0; c < chunk.live; ++c) b.total[c] += chunk.sum(t)[c];
      }
      chunk.hidden_gradient(v0, v1, b.z, u);
    });
    sums.for_rows([&](int64_t c) {
      const float weight = p.map.scale * row_weight[chunk.rows[c]], z = b.target[c];
      const float tanh_a = p.map.softcap == 0 ? 0 : z / (p.map.scale * p.map.softcap);
      const int64_t y = b.labels[c];
      const bool inside = y >= 0 && y < p.V;
      const float mean = static_cast<float>(-weight / b.total[c]), own = weight * (1 - tanh_a) * (1 + tanh_a);
      std::vector<float> target(H, 0.f);
      if (inside) k.load_row(p.weight, y, H, target.data());
      for (int64_t h = 0; h < H; ++h) u[c][h] = mean * u[c][h] + (inside ? own * target[h] : 0.f);
    });
    for (int64_t c = 0; c < chunk.live; ++c) chunk.write_logprob(c, reference[c], b.total[c], l, lse);
    sums.round_into_result(0);
  });
}

}  // namespace infopo
