// The pooled tail of a tile: words that no row of the chunk predicts with at least the threshold share one column of G.
// pooled_tail.cpp puts the pieces together.

namespace infopo::INFOPO_ISA {
namespace {

constexpr int64_t kMostRowsOfTile = 128;

INFOPO_INLINE float largest_lane(Vec x) {
  float lanes[kLanes], most;
  store(lanes, x);
  most = lanes[0];
  for (int l = 1; l < kLanes; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

// z -> G^T as in `gradient`. share[v] = sum_c p for words that may be pooled, kKept for the others. Returns whether some
// p is NaN.
template <bool kSoftcap>
bool gradient_and_mass(const LogitMap& map, const Tile& t, const bool* labelled, const float* lse,
                       const float* coefficient, float* p_row, const Tail& tail) {
  const Vec inverse_range = broadcast(kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f);
  bool bad = false;
  for (int64_t v = 0; v < t.rows; ++v) {
    Vec total = Vec{}, most = Vec{};
    float* row = t.z + v * t.ld;
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec z = load(row + c);
      Vec log_p = z - load(lse + c);
      log_p = log_p > Vec{} ? Vec{} : log_p;
      const Vec p = exp(log_p);
      total += p;
      most = p > most ? p : most;
      Vec g = load(coefficient + c) * p;
      if (kSoftcap) g = g * slope<kSoftcap>(z, inverse_range);
      store(row + c, g);
      if (tail.mass) store(p_row + c, p);
    }
    const float sum = sum_lanes(total);
    bad |= sum != sum;
    tail.share[v] = labelled[v] || !(largest_lane(most) < tail.threshold) ? kKept : sum;
    if (tail.mass && tail.share[v] != kKept) {
      for (int64_t c = 0; c < t.C; c += kLanes) store(tail.tile_mass + c, load(tail.tile_mass + c) + load(p_row + c));
    }
  }
  return bad;
}

// A tile of logits -> its kept rows of G^T at to, to + ld, ..., and after them the pooled row if there is a tail. Rows
// move only towards the front: `to` may be t.z or lie before it. Not settled yet. Returns the number of kept rows.
int64_t pool(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
             const float* coefficient, float* grad_bias, float* scratch, const Tail& tail, float* to) {
  const float inverse = map.softcap == 0 ? 0.f : 1.f / (map.scale * map.softcap);
  bool labelled[kMostRowsOfTile] = {};
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    const float tanh_a = map.softcap == 0 ? 0.f : t.z[v * t.ld + c] * inverse;  // z may be -inf without a softcap
    scratch[c] = coefficient[c] * (1.f - tanh_a) * (1.f + tanh_a);
    if (coefficient[c] != 0) labelled[v] = true;
  }
  for (int64_t c = 0; c < t.C; ++c) tail.tile_mass[c] = tail.pooled[c] = 0;
  float* p_row = scratch + t.C;
  const bool bad = map.softcap == 0 ? gradient_and_mass<false>(map, t, labelled, lse, coefficient, p_row, tail)
                                    : gradient_and_mass<true>(map, t, labelled, lse, coefficient, p_row, tail);
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v >= 0 && v < t.rows) t.z[v * t.ld + c] -= scratch[c];
  }
  int64_t kept = 0;
  float mass = 0;
  for (int64_t v = 0; v < t.rows; ++v) {
    tail.share[v] == kKept ? ++kept : mass += tail.share[v];
  }
  const bool all = bad || static_cast<float>(kept) > tail.exact_above * static_cast<float>(t.rows);
  const float inverse_mass = mass > 0 ? 1.f / mass : 0.f;
  for (int64_t v = 0; v < t.rows; ++v) {
    if (all) tail.share[v] = kKept;
    if (tail.share[v] != kKept) tail.share[v] *= inverse_mass;
  }
  if (all) kept = t.rows;
  int64_t k = 0;
  for (int64_t v = 0; v < t.rows; ++v) {
    const float* row = t.z + v * t.ld;
    if (tail.share[v] != kKept) {
      for (int64_t c = 0; c < t.C; c += kLanes) store(tail.pooled + c, load(tail.pooled + c) + load(row + c));
      continue;
    }
    float* moved = to + k++ * t.ld;
    if (moved == row && !grad_bias) continue;
    Vec total = Vec{};
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec g = load(row + c);
      store(moved + c, g);
      total += g;
    }
    if (grad_bias) grad_bias[t.v0 + v] += sum_lanes(total);
  }
  if (kept == t.rows) return kept;
  Vec total = Vec{};
  for (int64_t c = 0; c < t.C; c += kLanes) {
    const Vec g = load(tail.pooled + c);
    store(to + kept * t.ld + c, g);
    total += g;
    if (tail.mass) store(tail.mass + c, load(tail.mass + c) + load(tail.tile_mass + c));
  }
  if (grad_bias) {
    const float pooled = sum_lanes(total);
    for (int64_t v = 0; v < t.rows; ++v) {
      if (tail.share[v] != kKept) grad_bias[t.v0 + v] += tail.share[v] * pooled;
    }
  }
  return kept;
}

// out[h] = sum_v share[v] W[v0 + v][h] over the tail of a tile.
void tail_mean(const Matrix& W, int64_t v0, int64_t rows, const float* share, int64_t H, float* out) {
  constexpr int64_t kPart = 256;
  float part[kPart];
  for (int64_t h0 = 0; h0 < H; h0 += kPart) {
    const int64_t n = least(kPart, H - h0);
    for (int64_t h = 0; h < n; ++h) out[h0 + h] = 0;
    for (int64_t v = 0; v < rows; ++v) {
      if (share[v] == kKept || share[v] == 0) continue;
      const float* w = part;
      if (W.dtype == Dtype::kFloat32) {
        w = static_cast<const float*>(W.data) + (v0 + v) * W.stride + h0;
      } else {
        load_part(W, v0 + v, h0, n, part);
      }
      for (int64_t h = 0; h < n; ++h) out[h0 + h] += share[v] * w[h];
    }
  }
}

// out[v][h] = share[v] x[h] for the tail of a tile, or += with `add`; rows of `out` are H apart.
void spread_tail(const float* share, int64_t rows, const float* x, int64_t H, bool add, float* out) {
  for (int64_t v = 0; v < rows; ++v) {
    const float s = share[v];
    if (s == kKept || (s == 0 && add)) continue;
    float* row = out + v * H;
    if (add) {
      for (int64_t h = 0; h < H; ++h) row[h] += s * x[h];
    } else {
      for (int64_t h = 0; h < H; ++h) row[h] = s * x[h];
    }
  }
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
