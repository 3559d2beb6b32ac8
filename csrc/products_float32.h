// Products in float. Panels are float; 16-bit numbers are widened, which is exact, when they are packed or staged.

namespace infopo::INFOPO_ISA {
namespace {

// Register tile: kGroup rows x kPanelVectors vectors of accumulators, one row of B, one broadcast number of A.
// AVX-512 (32 registers): 6 x 4. AVX2 (16 registers): 6 x 2. Baseline (16 registers of 4): 4 x 2.
#if INFOPO_LANES == 16
constexpr int kGroup = 6, kPanelVectors = 4;
#elif INFOPO_LANES == 8
constexpr int kGroup = 6, kPanelVectors = 2;
#else
constexpr int kGroup = 4, kPanelVectors = 2;
#endif
constexpr int kPanel = kPanelVectors * kLanes, kColumns = kLanes;

// Rows of a tile: 16 register groups; the part of W [96, depth] and the logits [96, C] stay in L2.
constexpr int64_t kTile = 96;

// Panels hold floats, and a tile of logits may have any number of rows.
constexpr int kBlock = 1, kPackedBytes = 4;

// The products of a block take so long that it need not stay in the cache.
constexpr int64_t kMostBlock = int64_t{1} << 32;

// 2 cores of Emerald Rapids: the dW product runs at 160 GFLOP/s a core with 128 rows, at 80 with 48.
constexpr int kFewestStoredRows = 64;

// K block for A by row: 160 rows of a panel are 40 KiB, and one block of A stays in L1 while a panel is read.
constexpr int kDepth = 160, kStage = kDepth;

// K block for A by column. Each step loads a whole cache line into L1 for the kGroup numbers that it reads (2 cores of
// Emerald Rapids, dX of 512 rows, H 576, W in place: 96 is 1 % faster than 128 and 3 % faster than 192).
constexpr int kColumnDepth = 96;

// Prefetch distance, in steps, for lines of A by column: rows of a tile of logits are too far apart for the hardware
// prefetcher (2 to 3 %).
constexpr int kAhead = 8;

constexpr int64_t kFloat = sizeof(float);

// out [M, width] (+)= A [M, K] B [K, width], width = NV vectors. A pragma unrolls each loop over `acc`: without it the
// compiler moves all of `acc` through the stack (GCC 12: 3 % of a product).
template <int MR, int NV, bool kByColumn>
void register_tile(int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* const* out,
                   int64_t column, bool accumulate) {
  Vec acc[MR][NV];
  const float* row[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    row[i] = kByColumn ? a + i : a + i * lda;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      acc[i][j] = Vec{};
      // results of a large product are not in the cache: prefetch them now, add later
      if (accumulate) __builtin_prefetch(out[i] + column + j * kLanes, 1);
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < K; ++k) {
    Vec bk[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bk[j] = load(b + j * kLanes);
    b += ldb;
    if (kByColumn) __builtin_prefetch(a + kAhead * lda, 0, 3);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec aik = broadcast(kByColumn ? a[i] : row[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = fma(aik, bk[j], acc[i][j]);
    }
    if (kByColumn) a += lda;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    float* to = out[i] + column;
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(to + j * kLanes, accumulate ? load(to + j * kLanes) + acc[i][j] : acc[i][j]);
  }
}

using RegisterTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float* const*, int64_t, bool);

template <int MR, bool kByColumn>
RegisterTile register_tile_of_width(int vectors) {
  if constexpr (kPanelVectors == 4) {
    if (vectors == 4) return register_tile<MR, 4, kByColumn>;
    if (vectors == 3) return register_tile<MR, 3, kByColumn>;
  }
  return vectors == 2 ? register_tile<MR, 2, kByColumn> : register_tile<MR, 1, kByColumn>;
}

template <bool kByColumn>
RegisterTile register_tile_for(int rows, int vectors) {
  switch (rows) {
    case 1:
      return register_tile_of_width<1, kByColumn>(vectors);
    case 2:
      return register_tile_of_width<2, kByColumn>(vectors);
    case 3:
      return register_tile_of_width<3, kByColumn>(vectors);
    case 4:
      return register_tile_of_width<4, kByColumn>(vectors);
    case 5:
      return register_tile_of_width<5, kByColumn>(vectors);
    default:
      return register_tile_of_width<6, kByColumn>(vectors);
  }
}

void multiply(const Product& p) {
  const int64_t groups = ceil_div(p.M, kGroup), tasks = p.task_end - p.task_begin;
  if (tasks <= 0) return;
  const int64_t depth = ceil_div(p.K, ceil_div(p.K, p.a_by_column ? kColumnDepth : kDepth));
  for (int64_t k0 = 0; k0 < p.K; k0 += depth) {
    const int64_t K = least(depth, p.K - k0), next_K = least(depth, p.K - k0 - K);
    const bool accumulate = p.accumulate || k0 > 0;
    // The first access to the next block of A, and to the next panel of a B in place, would wait for memory. So each
    // register tile prefetches its share of them.
    const int64_t a_rows = p.a_by_column ? next_K : p.M;
    const int64_t a_share = ceil_div(a_rows, tasks), b_share = ceil_div(K, groups);
    int64_t a_asked = 0;
    for (int64_t panel = p.task_begin / groups, m = p.task_begin % groups, task = p.task_begin; task < p.task_end;
         ++panel, m = 0) {
      const int64_t n0 = panel * kPanel, columns = least(kPanel, p.N - n0), width = round_up(columns, kLanes);
      const int vectors = static_cast<int>(width / kLanes);
      const int64_t ldb = p.ldb ? p.ldb : width, next_columns = p.ldb ? least(kPanel, p.N - n0 - columns) : 0;
      const float* b = p.b + (p.ldb ? n0 : n0 * p.b_rows) + (p.b_row0 + k0) * ldb;
      for (; m < groups && task < p.task_end; ++m, ++task) {
        const int64_t m0 = m * kGroup;
        const int rows = static_cast<int>(least(kGroup, p.M - m0));
        const float* a = p.a_by_column ? p.a + k0 * p.lda + m0 : p.a + m0 * p.lda + k0;
        const RegisterTile tile =
            p.a_by_column ? register_tile_for<true>(rows, vectors) : register_tile_for<false>(rows, vectors);
        if (next_K > 0) {
          prefetch(p.a_by_column ? p.a + (k0 + K) * p.lda : p.a + k0 + K, p.lda * kFloat, a_asked,
                   least(a_rows, a_asked + a_share), (p.a_by_column ? p.M : next_K) * kFloat);
          a_asked += a_share;
        }
        if (next_columns > 0) {
          prefetch(b + kPanel, ldb * kFloat, m * b_share, least(K, (m + 1) * b_share), next_columns * kFloat);
        }
        if (columns == width) {
          tile(K, a, p.lda, b, ldb, p.out + m0, n0, accumulate);
          continue;
        }
        float edge[kGroup][kPanel];  // a result row ends inside this panel, and whole vectors would write past its end
        float* edge_rows[kGroup];
        for (int i = 0; i < rows; ++i) edge_rows[i] = edge[i];
        tile(K, a, p.lda, b, ldb, edge_rows, 0, false);
        for (int i = 0; i < rows; ++i) {
          float* to = p.out[m0 + i] + n0;
          for (int64_t j = 0; j < columns; ++j) to[j] = accumulate ? to[j] + edge[i][j] : edge[i][j];
        }
      }
    }
  }
}

void pack_rows(const Matrix& m, const int64_t* rows, int64_t row0, int64_t k0, int64_t k1, int64_t K, int64_t H,
               float* out) {
  for (int64_t k = k0; k < k1; ++k) {
    const int64_t row = rows ? rows[k] : row0 + k;
    for (int64_t h0 = 0; h0 < H; h0 += kPanel) {
      const int64_t columns = least(kPanel, H - h0), width = round_up(columns, kLanes);
      float* to = out + h0 * K + k * width;
      load_part(m, row, h0, columns, to);
      for (int64_t j = columns; j < width; ++j) to[j] = 0;
    }
  }
}

void pack_columns(const Matrix& X, const int64_t* rows, int64_t C, int64_t H, int64_t p0, int64_t p1, float* out) {
  constexpr int64_t kBlock = 64;
  float part[kBlock];
  for (int64_t c0 = p0 * kPanel; c0 < least(C, p1 * kPanel); c0 += kPanel) {
    const int64_t columns = least(kPanel, C - c0), width = round_up(columns, kLanes);
    float* panel = out + c0 * H;
    for (int64_t h0 = 0; h0 < H; h0 += kBlock) {
      const int64_t n = least(kBlock, H - h0);
      for (int64_t j = 0; j < width; ++j) {
        if (j < columns) {
          load_part(X, rows[c0 + j], h0, n, part);
        } else {
          for (int64_t i = 0; i < n; ++i) part[i] = 0;
        }
        for (int64_t i = 0; i < n; ++i) panel[(h0 + i) * width + j] = part[i];
      }
    }
  }
}

void logits(const Matrix& W, const float* packed_columns, int64_t H, const Tile& tile, float* stage) {
  float* out[kTile];
  for (int64_t v = 0; v < tile.rows; ++v) out[v] = tile.z + v * tile.ld;
  const int64_t tasks = ceil_div(tile.C, kPanel) * ceil_div(tile.rows, kGroup);
  Product p{.M = tile.rows,
            .N = tile.C,
            .K = H,
            .lda = W.stride,
            .b = packed_columns,
            .b_rows = H,
            .out = out,
            .task_end = tasks};
  if (W.dtype == Dtype::kFloat32) {
    p.a = static_cast<const float*>(W.data) + tile.v0 * W.stride;
    return multiply(p);
  }
  for (int64_t k0 = 0; k0 < H; k0 += kDepth) {
    p.K = least(kDepth, H - k0);
    for (int64_t v = 0; v < tile.rows; ++v) load_part(W, tile.v0 + v, k0, p.K, stage + v * kDepth);
    p.a = stage;
    p.lda = kDepth;
    p.b_row0 = k0;
    p.accumulate = k0 > 0;
    multiply(p);
  }
}

// A product reads the tile of floats in place, so there is nothing to settle.
INFOPO_INLINE void settle(const Tile&, float*) {}

// Entry (v, c) of a settled tile = x, here and in the other products.
INFOPO_INLINE void put_settled(const Tile& t, int64_t v, int64_t c, float x) { t.z[v * t.ld + c] = x; }

}  // namespace
}  // namespace infopo::INFOPO_ISA
