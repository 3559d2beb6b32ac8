// Passes over a tile of logits: bias and map, exponentials and their sums, the gradient.

namespace infopo::INFOPO_ISA {
namespace {

// Number of neighbouring column vectors that a pass takes together: whole cache lines, and independent sums.
constexpr int kAbreast = 4;

template <bool kSoftcap, int kVectors>
void finish_columns(const LogitMap& map, const Tile& t, int64_t c, float* max, double* sum) {
  const bool identity = !kSoftcap && map.scale == 1.f && !map.bias;
  const Vec inner = broadcast(kSoftcap ? 1.f / map.softcap : map.scale);
  const Vec outer = broadcast(map.scale * map.softcap);
  Vec old[kVectors], most[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) most[j] = old[j] = max ? load(max + c + j * kLanes) : Vec{};
  for (int64_t v = 0; v < t.rows; ++v) {
    float* at = t.z + v * t.ld + c;
    const Vec bias = broadcast(map.bias ? load_number(map.bias, t.v0 + v, map.bias_dtype) : 0.f);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vec z = load(at + j * kLanes);
      if (!identity) {
        const Vec a = z + bias;
        z = a * inner;
        if (kSoftcap) z = tanh(z) * outer + (a - a);  // an infinite a becomes NaN; tanh would hide it
        store(at + j * kLanes, z);
      }
      most[j] = z > most[j] ? z : most[j];
    }
  }
  if (!max) return;
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    store(max + c + j * kLanes, most[j]);
    if (!sum) continue;
    float factor[kLanes];
    store(factor, exp(old[j] - most[j]));
    double* to = sum + c + j * kLanes;
    for (int l = 0; l < kLanes; ++l) to[l] = to[l] == 0 ? 0 : to[l] * factor[l];
  }
}

template <bool kSoftcap>
void finish_as(const LogitMap& map, const Tile& t, float* max, double* sum) {
  if (!kSoftcap && map.scale == 1.f && !map.bias && !max) return;
  int64_t c = 0;
  for (; c + kAbreast * kLanes <= t.C; c += kAbreast * kLanes) finish_columns<kSoftcap, kAbreast>(map, t, c, max, sum);
  for (; c < t.C; c += kLanes) finish_columns<kSoftcap, 1>(map, t, c, max, sum);
}

void finish(const LogitMap& map, const Tile& t, float* max, double* sum) {
  map.softcap == 0 ? finish_as<false>(map, t, max, sum) : finish_as<true>(map, t, max, sum);
}

// dz/da / scale = 1 - tanh^2, computed from the finished z
template <bool kSoftcap>
INFOPO_INLINE Vec slope(Vec z, Vec inverse_range) {
  if (!kSoftcap) return broadcast(1.f);
  const Vec t = z * inverse_range;
  return (broadcast(1.f) - t) * (broadcast(1.f) + t);
}

// Part of a tile, from row v0 and column c0 on.
INFOPO_INLINE Tile part_of(const Tile& t, int64_t v0, int64_t rows, int64_t c0, int64_t columns) {
  return {.z = t.z + v0 * t.ld + c0, .ld = t.ld, .rows = rows, .C = columns, .v0 = t.v0 + v0, .by_column = t.by_column};
}

template <bool kSoftcap, bool kKeep, int kVectors>
void exponentials_columns(const LogitMap& map, const Tile& t, int64_t c, const float* ref, double* sum,
                          float* scratch) {
  const Vec inverse_range = broadcast(kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f);
  Vec reference[kVectors], total[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const Vec r = load(ref + c + j * kLanes);
    // If all logits of a row are -inf so far, the reference is 0: exp(-inf - 0) = 0, but exp(-inf + inf) = NaN.
    reference[j] = r == broadcast(-__builtin_inff()) ? Vec{} : r;
    total[j] = Vec{};
  }
  for (int64_t v0 = 0; v0 < t.rows; v0 += kBlock) {
    const int64_t rows = least(kBlock, t.rows - v0);
    for (int64_t v = v0; v < v0 + rows; ++v) {
      float* at = t.z + v * t.ld + c;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Vec z = load(at + j * kLanes);
        const Vec e = exp(z - reference[j]);
        total[j] += e;
        if (kKeep) store(at + j * kLanes, kSoftcap ? e * slope<kSoftcap>(z, inverse_range) : e);
      }
    }
    if (kKeep) settle(part_of(t, v0, rows, c, kVectors * kLanes), scratch);  // while the block is in L1
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float lanes[kLanes];
    store(lanes, total[j]);
    for (int l = 0; l < kLanes; ++l) sum[c + j * kLanes + l] += lanes[l];
  }
}

template <bool kSoftcap, bool kKeep>
void exponentials_as(const LogitMap& map, const Tile& t, const float* ref, double* sum, float* scratch) {
  constexpr int kFewest = kColumns / kLanes;
  int64_t c = 0;
  for (; c + kAbreast * kLanes <= t.C; c += kAbreast * kLanes) {
    exponentials_columns<kSoftcap, kKeep, kAbreast>(map, t, c, ref, sum, scratch);
  }
  for (; c < t.C; c += kColumns) exponentials_columns<kSoftcap, kKeep, kFewest>(map, t, c, ref, sum, scratch);
}

void exponentials(const LogitMap& map, const Tile& t, const float* ref, double* sum, bool keep, float* scratch) {
  if (map.softcap == 0) {
    keep ? exponentials_as<false, true>(map, t, ref, sum, scratch)
         : exponentials_as<false, false>(map, t, ref, sum, scratch);
  } else {
    keep ? exponentials_as<true, true>(map, t, ref, sum, scratch)
         : exponentials_as<true, false>(map, t, ref, sum, scratch);
  }
}

// coefficient * exp(z - lse) * dz/da / scale
template <bool kSoftcap>
INFOPO_INLINE Vec soft_gradient(Vec z, Vec lse, Vec coefficient, Vec inverse_range) {
  const Vec g = coefficient * exp(z - lse, 0);  // lse is rounded: for |z| > 1e7, p would be e or infinite
  return kSoftcap ? g * slope<kSoftcap>(z, inverse_range) : g;
}

template <bool kSoftcap>
void gradient_as(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
                 const float* coefficient, float* grad_bias, float* scratch) {
  const float inverse = kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f;
  const Vec inverse_range = broadcast(inverse);
  float *own = scratch, *at_label = scratch + t.C;
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    const float z = t.z[v * t.ld + c], tanh_a = kSoftcap ? z * inverse : 0.f;  // z may be -inf without a softcap
    own[c] = coefficient[c] * (1.f - tanh_a) * (1.f + tanh_a);
    const Vec soft = soft_gradient<kSoftcap>(broadcast(z), broadcast(lse[c]), broadcast(coefficient[c]), inverse_range);
    at_label[c] = soft[0] - own[c];
  }
  constexpr int64_t kWidth = kAbreast * kLanes;
  for (int64_t v0 = 0; v0 < t.rows; v0 += kBlock) {
    const int64_t rows = least(kBlock, t.rows - v0);
    for (int64_t c0 = 0; c0 < t.C; c0 += kWidth) {
      const int64_t columns = least(kWidth, t.C - c0);
      for (int64_t v = v0; v < v0 + rows; ++v) {
        float* row = t.z + v * t.ld;
        Vec total = Vec{};
        for (int64_t c = c0; c < c0 + columns; c += kLanes) {
          const Vec g = soft_gradient<kSoftcap>(load(row + c), load(lse + c), load(coefficient + c), inverse_range);
          store(row + c, g);
          total += g;
        }
        if (grad_bias) grad_bias[t.v0 + v] += sum_lanes(total);
      }
      settle(part_of(t, v0, rows, c0, columns), scratch);  // while the block is in L1
    }
  }
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    put_settled(t, v, c, at_label[c]);
    if (grad_bias) grad_bias[labels[c]] -= own[c];
  }
}

void gradient(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
              const float* coefficient, float* grad_bias, float* scratch) {
  map.softcap == 0 ? gradient_as<false>(map, t, live, labels, lse, coefficient, grad_bias, scratch)
                   : gradient_as<true>(map, t, live, labels, lse, coefficient, grad_bias, scratch);
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
