// Products of pairs of bfloat16 with float accumulators (vdpbf16ps). All pairs run along K:
//
//     panels            [K / 2][width][2], a last odd row filled up with zeros
//     W for the logits  its rows in place (pairs of neighbours), or staged if H is odd
//     a settled tile    rows v, v + 1 (v even) of float G^T, `ld` floats apart, are rounded once to bfloat16 and stored
//                       in two forms, one for each way of reading, in the memory of the floats:
//                         row v:      [C / 2][2 rows][2]  pairs along the tokens, A by row
//                         row v + 1:  [C][2]              pairs along the vocabulary, A by column
//                       Each form of a column takes the place of its floats, so any part of a tile may be settled alone.

namespace infopo::INFOPO_ISA {
namespace {

// Register tile and K block: as for floats, with a pair instead of a number.
constexpr int kGroup = 6, kPanelVectors = 4;
constexpr int kPanel = kPanelVectors * kLanes, kColumns = kLanes;
constexpr int kDepth = 384, kStage = kDepth / 2;
constexpr int64_t kTile = 96;
constexpr int kBlock = 2;              // a pair
constexpr int kFewestStoredRows = 64;  // as for floats, and the next
constexpr int64_t kMostBlock = int64_t{1} << 32;

// out [MR, width] (+)= A B over `pairs` of K; pair k of A's row i is at rows[i] + k * step. A pragma unrolls each loop
// over `acc`, as for floats.
template <int MR, int NV>
void register_tile(int64_t pairs, const uint16_t* const* rows, int64_t step, const uint16_t* b, float* const* out,
                   int64_t column, bool accumulate) {
  Vec acc[MR][NV];
  const uint16_t* a[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    a[i] = rows[i];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = Vec{};
      if (accumulate) __builtin_prefetch(out[i] + column + j * kLanes, 1);
    }
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < pairs; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const uint32_t pair = load_pair(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = dot_pairs(pair, b + j * 2 * kLanes, acc[i][j]);
      a[i] += step;
    }
    b += NV * 2 * kLanes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    float* to = out[i] + column;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(to + j * kLanes, accumulate ? load(to + j * kLanes) + acc[i][j] : acc[i][j]);
  }
}

using RegisterTile = void (*)(int64_t, const uint16_t* const*, int64_t, const uint16_t*, float* const*, int64_t, bool);

template <int MR>
RegisterTile register_tile_of_width(int vectors) {
  switch (vectors) {
    case 1:
      return register_tile<MR, 1>;
    case 2:
      return register_tile<MR, 2>;
    case 3:
      return register_tile<MR, 3>;
    default:
      return register_tile<MR, 4>;
  }
}

RegisterTile register_tile_for(int rows, int vectors) {
  switch (rows) {
    case 1:
      return register_tile_of_width<1>(vectors);
    case 2:
      return register_tile_of_width<2>(vectors);
    case 3:
      return register_tile_of_width<3>(vectors);
    case 4:
      return register_tile_of_width<4>(vectors);
    case 5:
      return register_tile_of_width<5>(vectors);
    default:
      return register_tile_of_width<6>(vectors);
  }
}

// row_at(m): start of row m of A
template <typename RowAt>
INFOPO_INLINE void multiply_rows(const Product& p, int64_t step, const RowAt& row_at) {
  const int64_t groups = ceil_div(p.M, kGroup), all_pairs = ceil_div(p.K, 2);
  const int64_t depth = ceil_div(all_pairs, ceil_div(all_pairs, kDepth / 2));
  for (int64_t k0 = 0; k0 < all_pairs; k0 += depth) {
    const int64_t pairs = least(depth, all_pairs - k0);
    const bool accumulate = p.accumulate || k0 > 0;
    for (int64_t task = p.task_begin; task < p.task_end; ++task) {
      const int64_t n0 = task / groups * kPanel, m0 = task % groups * kGroup;
      const int64_t columns = least(kPanel, p.N - n0), width = round_up(columns, kLanes);
      const int rows = static_cast<int>(least(kGroup, p.M - m0)), vectors = static_cast<int>(width / kLanes);
      const uint16_t* row[kGroup];
      for (int i = 0; i < rows; ++i) row[i] = row_at(m0 + i) + k0 * step;
      const uint16_t* b =
          reinterpret_cast<const uint16_t*>(p.b) + n0 * round_up(p.b_rows, 2) + (p.b_row0 / 2 + k0) * 2 * width;
      const RegisterTile tile = register_tile_for(rows, vectors);
      if (columns == width) {
        tile(pairs, row, step, b, p.out + m0, n0, accumulate);
        continue;
      }
      float edge[kGroup][kPanel];  // a result row ends inside this panel, and whole vectors would write past its end
      float* edge_rows[kGroup];
      for (int i = 0; i < rows; ++i) edge_rows[i] = edge[i];
      tile(pairs, row, step, b, edge_rows, 0, false);
      for (int i = 0; i < rows; ++i) {
        float* to = p.out[m0 + i] + n0;
        for (int64_t j = 0; j < columns; ++j) to[j] = accumulate ? to[j] + edge[i][j] : edge[i][j];
      }
    }
  }
}

// A is a settled tile.
void multiply(const Product& p) {
  const uint16_t* tile = reinterpret_cast<const uint16_t*>(p.a);
  const int64_t row = 2 * p.lda;  // bfloat16 numbers in the memory of a row of floats
  if (p.a_by_column) {
    multiply_rows(p, 2 * row, [=](int64_t m) { return tile + row + 2 * m; });
  } else {
    multiply_rows(p, 4, [=](int64_t m) { return tile + (m & ~int64_t{1}) * row + (m & 1) * 2; });
  }
}

void settle(const Tile& t, float*) {
  // word 2 i of a line is pair i of the first half of `both`, word 2 i + 1 of the second; the same for single numbers
  const __m512i words = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
  for (int64_t v = 0; v < t.rows; v += 2) {
    float *first = t.z + v * t.ld, *second = first + t.ld;
    for (int64_t c = 0; c < t.C; c += kLanes) {
      const __m512i both = round_to_bf16(load(first + c), v + 1 < t.rows ? load(second + c) : Vec{});
      _mm512_storeu_si512(first + c, _mm512_permutexvar_epi32(words, both));
      if (t.by_column) _mm512_storeu_si512(second + c, _mm512_permutexvar_epi16(numbers, both));
    }
  }
}

INFOPO_INLINE void put_settled(const Tile& t, int64_t v, int64_t c, float x) {
  uint16_t* first = reinterpret_cast<uint16_t*>(t.z + v / 2 * 2 * t.ld);
  const uint16_t rounded = float_to_bf16(x);
  first[c / 2 * 4 + v % 2 * 2 + c % 2] = rounded;
  if (t.by_column) first[2 * t.ld + 2 * c + v % 2] = rounded;
}

void logits(const Matrix& W, const float* packed_columns, int64_t H, const Tile& tile, float* stage) {
  float* out[kTile];
  for (int64_t v = 0; v < tile.rows; ++v) out[v] = tile.z + v * tile.ld;
  const int64_t tasks = ceil_div(tile.C, kPanel) * ceil_div(tile.rows, kGroup);
  const uint16_t* rows = static_cast<const uint16_t*>(W.data) + tile.v0 * W.stride;
  Product p{.M = tile.rows, .N = tile.C, .K = H, .b = packed_columns, .b_rows = H, .out = out, .task_end = tasks};
  if (H % 2 == 0) return multiply_rows(p, 2, [=](int64_t m) { return rows + m * W.stride; });
  uint16_t* staged = reinterpret_cast<uint16_t*>(stage);  // the partner of the last number must be zero
  for (int64_t k0 = 0; k0 < H; k0 += kDepth) {
    p.K = least(kDepth, H - k0);
    for (int64_t v = 0; v < tile.rows; ++v) {
      for (int64_t k = 0; k < p.K; ++k) staged[v * kDepth + k] = rows[v * W.stride + k0 + k];
      if (p.K % 2) staged[v * kDepth + p.K] = 0;
    }
    p.b_row0 = k0;
    p.accumulate = k0 > 0;
    multiply_rows(p, 2, [=](int64_t m) { return staged + m * kDepth; });
  }
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
