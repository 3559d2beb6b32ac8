// Panels of pairs of bfloat16: [K / 2][width][2]. A pair holds two neighbouring rows of a panel, in one column. Rows are
// filled up with zeros to whole blocks of kBlock rows, columns to a multiple of kColumns.

namespace infopo::INFOPO_ISA {
namespace {

constexpr int kPackedBytes = 2;

INFOPO_INLINE const uint16_t* row_of(const Matrix& m, int64_t row) {
  return static_cast<const uint16_t*>(m.data) + row * m.stride;
}

// k0 is the first row of a block; k1 is the first row of another, or K.
void pack_rows(const Matrix& m, const int64_t* rows, int64_t row0, int64_t k0, int64_t k1, int64_t K, int64_t H,
               float* out) {
  const int64_t padded_K = round_up(K, kBlock), end = k1 == K ? padded_K : k1;
  for (int64_t k = k0; k < end; k += 2) {
    const uint16_t* first = k < K ? row_of(m, rows ? rows[k] : row0 + k) : nullptr;
    const uint16_t* second = k + 1 < K ? row_of(m, rows ? rows[k + 1] : row0 + k + 1) : nullptr;
    for (int64_t h0 = 0; h0 < H; h0 += kPanel) {
      const int64_t columns = least(kPanel, H - h0), width = round_up(columns, kColumns);
      uint16_t* panel = reinterpret_cast<uint16_t*>(out) + h0 * padded_K;
      uint32_t* pairs = reinterpret_cast<uint32_t*>(panel) + k / 2 * width;
      int64_t j = 0;
      if (second) {
        for (; j < columns; ++j) pairs[j] = first[h0 + j] | (static_cast<uint32_t>(second[h0 + j]) << 16);
      } else if (first) {
        for (; j < columns; ++j) pairs[j] = first[h0 + j];
      }
      for (; j < width; ++j) pairs[j] = 0;
    }
  }
}

void pack_columns(const Matrix& X, const int64_t* rows, int64_t C, int64_t H, int64_t p0, int64_t p1, float* out) {
  const int64_t padded_H = round_up(H, kBlock);
  for (int64_t c0 = p0 * kPanel; c0 < least(C, p1 * kPanel); c0 += kPanel) {
    const int64_t columns = least(kPanel, C - c0), width = round_up(columns, kColumns);
    uint32_t* panel = reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(out) + c0 * padded_H);
    for (int64_t j0 = 0; j0 < width; j0 += kLanes) {
      for (int64_t h = 0; h < padded_H; h += 2 * kLanes) {
        __m512i words[kLanes];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLanes; ++j) {
          words[j] = j0 + j < columns ? load_numbers(row_of(X, rows[c0 + j0 + j]) + h, H - h) : _mm512_setzero_si512();
        }
        transpose_words(words);
        const int64_t pairs = least(kLanes, (padded_H - h) / 2);
        for (int64_t i = 0; i < pairs; ++i) _mm512_storeu_si512(panel + (h / 2 + i) * width + j0, words[i]);
      }
    }
  }
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
