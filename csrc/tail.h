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

// share[v] = 0 for words with z - lse below log_threshold in every row, kKept for the others and all labels. Returns the
// number of kept words.
int64_t choose(const Tile& t, const bool* labelled, const float* lse, float log_threshold, float* share) {
  int64_t kept = 0;
  for (int64_t v = 0; v < t.rows; ++v) {
    const float* row = t.z + v * t.ld;
    Vec most = broadcast(-__builtin_inff());
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec log_p = load(row + c) - load(lse + c);
      most = log_p > most ? log_p : most;
    }
    share[v] = labelled[v] || largest_lane(most) >= log_threshold ? kKept : 0;
    kept += share[v] == kKept;
  }
  return kept;
}

// A tile of logits -> its kept rows of G^T at to, to + ld, ..., and after them the pooled row if there is a tail. `to`
// may lie in other memory, or be t.z or lie before it: rows then move only towards the front. Not settled yet. Returns the number of kept rows.
// tail.mass, if given, += the probability of the tail.
template <bool kSoftcap>
int64_t pool_as(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
                const float* coefficient, float* grad_bias, float* scratch, const Tail& tail, float* to) {
  const float inverse = kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f;
  const Vec inverse_range = broadcast(inverse);
  bool labelled[kMostRowsOfTile] = {}, bad = false;
  for (int64_t c = 0; c < live; ++c) {
    bad |= !(lse[c] > -__builtin_inff());  // its p is NaN
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    const float tanh_a = kSoftcap ? t.z[v * t.ld + c] * inverse : 0.f;  // z may be -inf without a softcap
    scratch[c] = coefficient[c] * (1.f - tanh_a) * (1.f + tanh_a);
    labelled[v] |= coefficient[c] != 0;
  }
  int64_t kept = choose(t, labelled, lse, tail.log_threshold, tail.share);
  if (bad || static_cast<float>(kept) > tail.exact_above * static_cast<float>(t.rows)) {
    kept = t.rows;
    for (int64_t v = 0; v < t.rows; ++v) tail.share[v] = kKept;
  }
  float* const p_sum = scratch + t.C;  // of the tail
  if (kept < t.rows) {
    for (int64_t c = 0; c < t.C; ++c) p_sum[c] = tail.pooled[c] = 0;
  }
  int64_t position[kMostRowsOfTile], k = 0;
  float mass = 0;
  for (int64_t v = 0; v < t.rows; ++v) {
    const float* row = t.z + v * t.ld;
    const bool keep = tail.share[v] == kKept;
    float* const result = to + k * t.ld;
    position[v] = k;
    k += keep;
    Vec total = Vec{};
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec z = load(row + c);
      Vec log_p = z - load(lse + c);
      log_p = log_p > Vec{} ? Vec{} : log_p;
      const Vec p = exp(log_p);
      if (keep) {
        Vec g = load(coefficient + c) * p;
        if (kSoftcap) g = g * slope<kSoftcap>(z, inverse_range);
        store(result + c, g);
        total += g;
      } else {
        total += p;
        store(p_sum + c, load(p_sum + c) + p);
        if (kSoftcap) store(tail.pooled + c, load(tail.pooled + c) + p * slope<kSoftcap>(z, inverse_range));
      }
    }
    if (!keep) mass += tail.share[v] = sum_lanes(total);
    if (keep && grad_bias) grad_bias[t.v0 + v] += sum_lanes(total);
  }
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows || tail.share[v] != kKept) continue;
    to[position[v] * t.ld + c] -= scratch[c];
    if (grad_bias) grad_bias[labels[c]] -= scratch[c];
  }
  if (kept == t.rows) return kept;
  const float inverse_mass = mass > 0 ? 1.f / mass : 0.f;
  Vec total = Vec{};
  for (int64_t c = 0; c < t.C; c += kLanes) {
    const Vec g = load(coefficient + c) * load((kSoftcap ? tail.pooled : p_sum) + c);
    store(to + kept * t.ld + c, g);
    total += g;
    if (tail.mass) store(tail.mass + c, load(tail.mass + c) + load(p_sum + c));
  }
  const float pooled = sum_lanes(total);
  for (int64_t v = 0; v < t.rows; ++v) {
    if (tail.share[v] == kKept) continue;
    tail.share[v] *= inverse_mass;
    if (grad_bias) grad_bias[t.v0 + v] += tail.share[v] * pooled;
  }
  return kept;
}

int64_t pool(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
             const float* coefficient, float* grad_bias, float* scratch, const Tail& tail, float* to) {
  return map.softcap == 0 ? pool_as<false>(map, t, live, labels, lse, coefficient, grad_bias, scratch, tail, to)
                          : pool_as<true>(map, t, live, labels, lse, coefficient, grad_bias, scratch, tail, to);
}

// Rows of W are read so many words ahead: they lie too far apart for the hardware prefetcher.
constexpr int64_t kWordsAhead = 6;

// out[h0 + j] = sum_i weight[i] W[word[i]][h0 + j] for kVectors vectors of columns. Their sums stay in registers.
template <Dtype kDtype, int kVectors>
void weighted_rows(const Matrix& W, int64_t n, const int64_t* word, const float* weight, int64_t h0, float* out) {
  Vec sum[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) sum[j] = Vec{};
  for (int64_t i = 0; i < n; ++i) {
    const Vec factor = broadcast(weight[i]);
    const int64_t at = word[i] * W.stride + h0;
    if (i + kWordsAhead < n) {
      const int64_t size = kDtype == Dtype::kFloat32 ? 4 : 2;
      prefetch(static_cast<const char*>(W.data) + (word[i + kWordsAhead] * W.stride + h0) * size, 0, 0, 1,
               kVectors * kLanes * size);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[j] = fma(factor, load_vector<kDtype>(W.data, at + j * kLanes), sum[j]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) store(out + h0 + j * kLanes, sum[j]);
}

template <Dtype kDtype>
void tail_mean_as(const Matrix& W, int64_t n, const int64_t* word, const float* weight, int64_t H, float* out) {
  constexpr int kMost = 8;
  int64_t h = 0;
  for (; h + kMost * kLanes <= H; h += kMost * kLanes) weighted_rows<kDtype, kMost>(W, n, word, weight, h, out);
  for (; h + kLanes <= H; h += kLanes) weighted_rows<kDtype, 1>(W, n, word, weight, h, out);
  for (; h < H; ++h) {
    out[h] = 0;
    for (int64_t i = 0; i < n; ++i) out[h] += weight[i] * load_number(W.data, word[i] * W.stride + h, kDtype);
  }
}

// out[h] = sum_v share[v] W[v0 + v][h] over the tail of a tile.
void tail_mean(const Matrix& W, int64_t v0, int64_t rows, const float* share, int64_t H, float* out) {
  int64_t word[kMostRowsOfTile], n = 0;
  float weight[kMostRowsOfTile];
  for (int64_t v = 0; v < rows; ++v) {
    if (share[v] == kKept || share[v] == 0) continue;
    word[n] = v0 + v;
    weight[n++] = share[v];
  }
  switch (W.dtype) {
    case Dtype::kFloat32:
      return tail_mean_as<Dtype::kFloat32>(W, n, word, weight, H, out);
    case Dtype::kBFloat16:
      return tail_mean_as<Dtype::kBFloat16>(W, n, word, weight, H, out);
    default:
      return tail_mean_as<Dtype::kFloat16>(W, n, word, weight, H, out);
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
