// Passes over a tile of logits: bias and map, exponentials and their sums, the gradient.

namespace infopo::INFOPO_ISA {
namespace {

template <bool kSoftcap>
void finish_as(const LogitMap& map, const Tile& t, float* max, double* sum) {
  const bool identity = !kSoftcap && map.scale == 1.f && !map.bias;
  if (identity && !max) return;
  const float inner = kSoftcap ? 1.f / map.softcap : map.scale;
  const Vec outer = broadcast(map.scale * map.softcap);
  for (int64_t c = 0; c < t.C; c += kLanes) {
    const Vec old = max ? load(max + c) : Vec{};
    Vec most = old;
    for (int64_t v = 0; v < t.rows; ++v) {
      float* at = t.z + v * t.ld + c;
      Vec z = load(at);
      if (!identity) {
        const float b = map.bias ? load_number(map.bias, t.v0 + v, map.bias_dtype) : 0.f;
        z = (z + broadcast(b)) * broadcast(inner);
        if (kSoftcap) z = tanh(z) * outer;
        store(at, z);
      }
      most = z > most ? z : most;
    }
    if (!max) continue;
    store(max + c, most);
    if (!sum) continue;
    float factor[kLanes];
    store(factor, exp(old - most));
    for (int l = 0; l < kLanes; ++l) sum[c + l] = sum[c + l] == 0 ? 0 : sum[c + l] * factor[l];
  }
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

template <bool kSoftcap, bool kKeep>
void exponentials_as(const LogitMap& map, const Tile& t, const float* ref, double* sum) {
  const Vec inverse_range = broadcast(kSoftcap ? 1.f / (map.scale * map.softcap) : 0.f);
  for (int64_t c = 0; c < t.C; c += kLanes) {
    Vec reference = load(ref + c);
    // a row whose logits are all -inf so far: exp(-inf - 0) = 0, not exp(-inf + inf) = NaN
    reference = reference == broadcast(-__builtin_inff()) ? Vec{} : reference;
    Vec total = Vec{};
    for (int64_t v = 0; v < t.rows; ++v) {
      float* at = t.z + v * t.ld + c;
      const Vec z = load(at);
      const Vec e = exp(z - reference);
      total += e;
      if (kKeep) store(at, kSoftcap ? e * slope<kSoftcap>(z, inverse_range) : e);
    }
    float lanes[kLanes];
    store(lanes, total);
    for (int l = 0; l < kLanes; ++l) sum[c + l] += lanes[l];
  }
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
    const float tanh_a = t.z[v * t.ld + c] * inverse;
    scratch[c] = coefficient[c] * (1.f - tanh_a) * (1.f + tanh_a);
  }
  for (int64_t v = 0; v < t.rows; ++v) {
    Vec total = Vec{};
    float* row = t.z + v * t.ld;
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const Vec z = load(row + c);
      Vec g = load(coefficient + c) * exp(z - load(lse + c));
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
