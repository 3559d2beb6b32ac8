// Vectors of float: the only file with intrinsics.
//
// foreach_target.h includes this file once for each instruction set. It sets INFOPO_LANES (16, 8 or 4) and INFOPO_ISA
// (the namespace that keeps the copies apart). The code uses the compilers' vector extensions where they suffice, and
// intrinsics for the rest: broadcast, fused multiply-add, cheap conversions.
//
//   exp(x)   = 2^n * (1 + r + r^2 P(r)),  n = round(x / ln 2), r = x - n ln 2, |r| <= ln(2) / 2
//   tanh(x)  = x + x^3 Q(x^2) for |x| < 0.625, else sign(x) (1 - 2 / (exp(2 |x|) + 1))
//
// P (degree 4, error of exp 3.4e-9) and Q (degree 5, error 2e-10) are minimax fits by Lawson's iteration. Their error
// is below the rounding of float. Both return NaN for NaN.

#include "tile_kernels.h"

namespace infopo::INFOPO_ISA {

inline constexpr int kLanes = INFOPO_LANES;

#if INFOPO_LANES == 16
using Vec = __m512;
using Bits = __attribute__((vector_size(64))) uint32_t;
using Halves = __attribute__((vector_size(32))) uint16_t;
#elif INFOPO_LANES == 8
using Vec = __m256;
using Bits = __attribute__((vector_size(32))) uint32_t;
using Halves = __attribute__((vector_size(16))) uint16_t;
#else
using Vec = __attribute__((vector_size(16))) float;
using Bits = __attribute__((vector_size(16))) uint32_t;
using Halves = __attribute__((vector_size(8))) uint16_t;
#endif

#define INFOPO_INLINE inline __attribute__((always_inline))

INFOPO_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

INFOPO_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof x); }

INFOPO_INLINE Vec broadcast(float x) {
#if INFOPO_LANES == 16
  return _mm512_set1_ps(x);
#elif INFOPO_LANES == 8
  return _mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

// a * b + c; rounded once if the instruction set has such an instruction
INFOPO_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if INFOPO_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif INFOPO_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

INFOPO_INLINE float sum_lanes(Vec x) {
  float lanes[kLanes], total = 0;
  store(lanes, x);
  for (int l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

// Widens kLanes 16-bit numbers to float, which is exact.
INFOPO_INLINE Vec widen_bf16(const uint16_t* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return reinterpret_cast<Vec>(__builtin_convertvector(x, Bits) << 16);
}

INFOPO_INLINE Vec widen_f16(const uint16_t* p) {
#if INFOPO_LANES == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif INFOPO_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return Vec{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
#endif
}

INFOPO_INLINE void store_f16(uint16_t* to, Vec x) {
#if INFOPO_LANES == 16
  const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#elif INFOPO_LANES == 8
  const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = float_to_half(x[i]);
#endif
}

INFOPO_INLINE void narrow_f16(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_f16(to + i, load(from + i));
  for (; i < n; ++i) to[i] = float_to_half(from[i]);
}

INFOPO_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);  // a NaN stays a NaN, whatever its low bits are
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INFOPO_INLINE void narrow_bf16(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#if INFOPO_BF16
  for (; i + kLanes <= n; i += kLanes) {
    const __m256i x = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(from + i)));
    __builtin_memcpy(to + i, &x, sizeof x);
  }
#endif
  for (; i < n; ++i) to[i] = float_to_bf16(from[i]);
}

#if INFOPO_BF16
// c + a_0 b_0 + a_1 b_1 for pairs of bfloat16. `pair` is the same for every lane, and holds a_0 in its low half.
INFOPO_INLINE Vec dot_pairs(uint32_t pair, const uint16_t* b, Vec c) {
  const __m512i a = _mm512_set1_epi32(static_cast<int>(pair));
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
}

// Rounds two vectors to bfloat16, one after the other.
INFOPO_INLINE __m512i round_to_bf16(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// 32 numbers of 16 bits; zeros from number n on.
INFOPO_INLINE __m512i load_numbers(const uint16_t* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p);
}

// Transposes 16 x 16 words of 32 bits.
INFOPO_INLINE void transpose_words(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // then word j of quarter q of r[i + j] is word 4 q + j of row i, ...
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a transposition of quarters
    const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88),
                  odd2 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}
#endif

#if INFOPO_LANES == 16
// exp(min(x, most)). The instruction that scales gives 0 and infinity where they belong, as long as the polynomial is
// finite: hence the bounds. One product with ln 2 is enough: its error is 2e-9 n, that of 4 roundings at -87.
INFOPO_INLINE Vec exp(Vec x, float most = 89.f) {
  x = _mm512_max_ps(broadcast(-110.f), _mm512_min_ps(broadcast(most), x));  // both return x if it is NaN
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec n = fma(x, broadcast(1.44269504f), magic) - magic;
  const Vec r = fma(n, broadcast(-0.693147182f), x);
  Vec p = broadcast(0.0013951717410236597f);
  p = fma(p, r, broadcast(0.008369598537683487f));
  p = fma(p, r, broadcast(0.0416661873459816f));
  p = fma(p, r, broadcast(0.16666512191295624f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.f));
  p = fma(p, r, broadcast(1.f));
  return _mm512_scalef_ps(p, n);
}
#else
// exp(min(x, most)); zero below -87 (no subnormals), infinity above 88.
INFOPO_INLINE Vec exp(Vec x, float most = __builtin_inff()) {
  x = x > broadcast(most) ? broadcast(most) : x;
  const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: after the addition the low bits are round(x / ln 2)
  const Vec shifted = fma(x, broadcast(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts; the first has few bits: times n it is exact
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(0.0013951717410236597f);
  p = fma(p, r, broadcast(0.008369598537683487f));
  p = fma(p, r, broadcast(0.0416661873459816f));
  p = fma(p, r, broadcast(0.16666512191295624f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p * r, r, r) + broadcast(1.f);
  const Bits exponent = (reinterpret_cast<Bits>(shifted) << 23) + (127u << 23);
  Vec y = p * reinterpret_cast<Vec>(exponent);
  y = x < broadcast(-87.f) ? Vec{} : y;
  return x > broadcast(88.f) ? broadcast(__builtin_inff()) : y;
}
#endif

INFOPO_INLINE Vec tanh(Vec x) {
  const Vec size = x < Vec{} ? -x : x;
  const Vec u = x * x;
  Vec q = broadcast(0.00209772028028965f);
  q = fma(q, u, broadcast(-0.00812899973243475f));
  q = fma(q, u, broadcast(0.021681642159819603f));
  q = fma(q, u, broadcast(-0.05394339933991432f));
  q = fma(q, u, broadcast(0.1333318054676056f));
  q = fma(q, u, broadcast(-0.3333333134651184f));
  const Vec near = fma(q * u, x, x);
  const Vec far = broadcast(1.f) - broadcast(2.f) / (exp(size + size) + broadcast(1.f));
  const Vec signed_far = x < Vec{} ? -far : far;
  return size < broadcast(0.625f) ? near : signed_far;
}

}  // namespace infopo::INFOPO_ISA
