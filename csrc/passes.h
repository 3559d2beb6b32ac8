// Passes over a tile of logits: bias and map, exponentials and their sums, the gradient.

namespace infopo::INFOPO_ISA {
namespace {

// Vectors of columns that a pass takes side by side: whole cache lines of neighbouring columns, independent sums.
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
        if (kSoftcap) z = tanh(z) * outer + (a - a);  // an infinite a becomes NaN, not a plausible softcap
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

// dz/da / scale = 1 - tanh^2, from the finished z
template <bool kSoftcap>
INFOPO_INLINE Vec slope(Vec z, Vec inverse_range) {
  if (!kSoftcap) return broadcast(1.f);
  const Vec t = z * inverse_range;
  return (broadcast(1.f) - t) * (broadcast(1.f) + t);
}

template <bool kSoftcap, bool kKeep, int kVectors>
void exponentials_columns(const LogitMap& map, const Tile& t, int64_t c, const float* ref, double* sum) {
  const Vec inverse_range = broadcast(kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f);
  Vec reference[kVectors], total[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const Vec r = load(ref + c + j * kLanes);
    // a row whose logits are all -inf so far: exp(-inf - 0) = 0, not exp(-inf + inf) = NaN
    reference[j] = r == broadcast(-__builtin_inff()) ? Vec{} : r;
    total[j] = Vec{};
  }
  for (int64_t v = 0; v < t.rows; ++v) {
    float* at = t.z + v * t.ld + c;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Vec z = load(at + j * kLanes);
      const Vec e = exp(z - reference[j]);
      total[j] += e;
      if (kKeep) store(at + j * kLanes, kSoftcap ? e * slope<kSoftcap>(z, inverse_range) : e);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float lanes[kLanes];
    store(lanes, total[j]);
    for (int l = 0; l < kLanes; ++l) sum[c + j * kLanes + l] += lanes[l];
  }
}

template <bool kSoftcap, bool kKeep>
void exponentials_as(const LogitMap& map, const Tile& t, const float* ref, double* sum) {
  int64_t c = 0;
  for (; c + kAbreast * kLanes <= t.C; c += kAbreast * kLanes) {
    exponentials_columns<kSoftcap, kKeep, kAbreast>(map, t, c, ref, sum);
  }
  for (; c < t.C; c += kLanes) exponentials_columns<kSoftcap, kKeep, 1>(map, t, c, ref, sum);
}

void exponentials(const LogitMap& map, const Tile& t, const float* ref, double* sum, bool keep, float* scratch) {
  if (map.softcap == 0) {
    keep ? exponentials_as<false, true>(map, t, ref, sum) : exponentials_as<false, false>(map, t, ref, sum);
  } else {
    keep ? exponentials_as<true, true>(map, t, ref, sum) : exponentials_as<true, false>(map, t, ref, sum);
  }
  if (keep) settle(t, scratch);
}

template <bool kSoftcap>
void gradient_as(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
                 const float* coefficient, float* grad_bias, float* scratch) {
  const float inverse = kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f;
  const Vec inverse_range = broadcast(inverse);
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    const float tanh_a = kSoftcap ? t.z[v * t.ld + c] * inverse : 0.f;  // z may be -inf without a softcap
    scratch[c] = coefficient[c] * (1.f - tanh_a) * (1.f + tanh_a);
  }
  for (int64_t v = 0; v < t.rows; ++v) {
    Vec total = Vec{};
    float* row = t.z + v * t.ld;
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec z = load(row + c);
      Vec log_p = z - load(lse + c);
      log_p = log_p > Vec{} ? Vec{} : log_p;  // lse is rounded: where |z| > 1e7, p would be e or infinite
      Vec g = load(coefficient + c) * exp(log_p);
      if (kSoftcap) g = g * slope<kSoftcap>(z, inverse_range);
      store(row + c, g);
      total += g;
    }
    if (grad_bias) grad_bias[t.v0 + v] += sum_lanes(total);
  }
  for (int64_t c = 0; c < live; ++c) {
    const int64_t v = labels[c] - t.v0;
    if (v < 0 || v >= t.rows) continue;
    t.z[v * t.ld + c] -= scratch[c];
    if (grad_bias) grad_bias[labels[c]] -= scratch[c];
  }
}

void gradient(const LogitMap& map, const Tile& t, int64_t live, const int64_t* labels, const float* lse,
              const float* coefficient, float* grad_bias, float* scratch) {
  map.softcap == 0 ? gradient_as<false>(map, t, live, labels, lse, coefficient, grad_bias, scratch)
                   : gradient_as<true>(map, t, live, labels, lse, coefficient, grad_bias, scratch);
  settle(t, scratch);
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
