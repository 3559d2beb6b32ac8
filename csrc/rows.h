// Rows of any type to float and back; the start of each panel; the shared part of both kinds of products.

namespace infopo::INFOPO_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

INFOPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INFOPO_INLINE void prefetch(const void* rows, int64_t row_bytes, int64_t begin, int64_t end, int64_t bytes) {
  for (int64_t i = begin; i < end; ++i) {
    const char* row = static_cast<const char*>(rows) + i * row_bytes;
    for (int64_t j = 0; j < bytes; j += kLine) __builtin_prefetch(row + j, 0, 2);
  }
}

INFOPO_INLINE uint32_t load_pair(const uint16_t* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return pair;
}

INFOPO_INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

INFOPO_INLINE float load_number(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == Dtype::kBFloat16 ? bits_to_float(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

template <Dtype kDtype>
INFOPO_INLINE Vec load_vector(const void* data, int64_t i) {
  if constexpr (kDtype == Dtype::kFloat32) return load(static_cast<const float*>(data) + i);
  const uint16_t* p = static_cast<const uint16_t*>(data) + i;
  return kDtype == Dtype::kBFloat16 ? widen_bf16(p) : widen_f16(p);
}

// n numbers of row `row`, from column h0 on
INFOPO_INLINE void load_part(const Matrix& m, int64_t row, int64_t h0, int64_t n, float* out) {
  const int64_t at = row * m.stride + h0;
  int64_t i = 0;
  if (m.dtype == Dtype::kFloat32) {
    const float* p = static_cast<const float*>(m.data) + at;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(p + i));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
    if (m.dtype == Dtype::kBFloat16) {
      for (; i + kLanes <= n; i += kLanes) store(out + i, widen_bf16(p + i));
    } else {
      for (; i + kLanes <= n; i += kLanes) store(out + i, widen_f16(p + i));
    }
  }
  for (; i < n; ++i) out[i] = load_number(m.data, at + i, m.dtype);
}

void load_row(const Matrix& m, int64_t row, int64_t H, float* out) { load_part(m, row, 0, H, out); }

void store_row(const float* row, int64_t H, bool add, Dtype dtype, void* out) {
  if (dtype == Dtype::kFloat32) {
    float* to = static_cast<float*>(out);
    for (int64_t h = 0; h < H; ++h) to[h] = add ? to[h] + row[h] : row[h];
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  const Matrix old{out, H, dtype};
  constexpr int64_t kPart = 64;
  float part[kPart];
  for (int64_t h0 = 0; h0 < H; h0 += kPart) {
    const int64_t n = least(kPart, H - h0);
    if (add) load_part(old, 0, h0, n, part);
    for (int64_t i = 0; i < n; ++i) part[i] = add ? part[i] + row[h0 + i] : row[h0 + i];
    if (dtype == Dtype::kBFloat16) {
      narrow_bf16(part, n, to + h0);
    } else {
      narrow_f16(part, n, to + h0);
    }
  }
}

void narrow_logits(const float* z, const float* reference, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_f16(out + i, load(z + i) - load(reference + i));
  for (; i < n; ++i) out[i] = float_to_half(z[i] - reference[i]);
}

void widen_logits(const uint16_t* kept, const float* reference, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, widen_f16(kept + i) + load(reference + i));
  for (; i < n; ++i) out[i] = half_to_float(kept[i]) + reference[i];
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
