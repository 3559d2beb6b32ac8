// The kernels of one instruction set: products of packed panels, and the passes over a tile of logits.
//
// Letters: N rows, H hidden size, V vocabulary, C rows of a chunk (tokens). Matrices are row-major unless stated.
//
// A panel is a strip of `panel` columns. Panels are stored one after the other, each as [K][width]. The last one is
// only as wide as its columns need, rounded up to whole vectors and filled with zeros. So a product
//
//     out [M, N] (+)= A [M, K] B [K, N]
//
// reads B along panels, vector by vector, and broadcasts single numbers of A. A is never packed. Tokens are the columns
// of a tile of logits (Z^T [V, C]), so that three products read it without transposition:
//
//     Z^T = W X^T        A = W     by row        B = panels of X^T (pack_columns)
//     dW  = G^T X        A = G^T   by row        B = panels of X   (pack_rows)
//     dX  = G W          A = G^T   by column     B = panels of W   (pack_rows)
//
// The kernels choose the format of A and of panels: float, or pairs of bfloat16 (pairs_bf16.h). Callers only pass on
// the output of `pack_*`, `exponentials` and `gradient`, in buffers whose size is counted in floats.
#pragma once

#include <cstdint>

namespace infopo {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Row `row` of a contiguous [., H].
inline void* result_row(void* data, Dtype dtype, int64_t row, int64_t H) {
  return static_cast<char*>(data) + row * H * element_size(dtype);
}

// Rows of H elements of `dtype`, `stride` elements apart.
struct Matrix {
  const void* data;
  int64_t stride;
  Dtype dtype;
};

// z = scale * softcap * tanh((a + b) / softcap), or scale * (a + b) if softcap is 0; b = bias[v] of any Dtype, or 0.
struct LogitMap {
  const void* bias;
  Dtype bias_dtype;
  float softcap;
  float scale;
};

struct Product {
  int64_t M, N, K;
  const float* a = nullptr;
  int64_t lda = 0;
  bool a_by_column = false;  // A[i][k] is a[k * lda + i], else a[i * lda + k]
  const float* b = nullptr;  // panels of a matrix [b_rows, N]; or, with ldb, the matrix itself, with rows ldb apart
  int64_t ldb = 0;
  int64_t b_rows = 0;
  int64_t b_row0 = 0;                    // the product takes its rows b_row0 ... b_row0 + K - 1
  float* const* out = nullptr;           // M rows of N numbers
  bool accumulate = false;               // else assign
  int64_t task_begin = 0, task_end = 0;  // of product_tasks(M, N): panel-major pairs (panel, group of rows)
};

// A tile [rows, C] of Z^T, with rows `ld` apart: the logits of vocabulary entries v0 ... v0 + rows - 1.
// C is a whole number of vectors. Nothing reads the columns beyond the chunk's rows.
struct Tile {
  float* z;
  int64_t ld;
  int64_t rows, C;
  int64_t v0;
  bool by_column;  // dX is wanted, so a product will read the tile by column
};

// The tail of a tile (tail.h). `share` is a result.
struct Tail {
  float log_threshold;  // words whose log p is below it in every row of the chunk are pooled
  float exact_above;    // all words of the tile are kept if more than this share would be
  float* share;         // [rows] pi_v; kKept for words that are kept
  float* pooled;        // [C] scratch
  float* mass;          // [C] += sum of p over the pooled words; or null
};

constexpr float kKept = -1;

// Vocabulary entries of a tile with a tail, which is a block of the definition in pooled_tail.h.
constexpr int64_t kTailTile = 96;

constexpr int64_t kMostTileRows = 192;

struct TileKernels {
  const char* name;
  int64_t tile;        // vocabulary entries of a tile, at most kMostTileRows
  int lanes;           // columns are padded to a multiple of this
  int row_group;       // rows of A that a register tile takes
  int panel;           // columns that a register tile takes
  int stage;           // floats in which `logits` stages a row of a 16-bit W
  int block;           // the rows of panels and the memory of a tile of logits are padded to whole blocks of rows
  int packed_bytes;    // bytes of a number in a panel
  int64_t most_block;  // vocabulary entries of a block for each thread, at most
  // If only chunks of fewer rows fit with all their logits, forming logits twice is faster, because each chunk reads and
  // writes all of a float32 dW.
  int fewest_stored_rows;

  // out: panels of X^T [H, C]; panels p0 ... p1 - 1. rows[c] is the row of X in column c.
  void (*pack_columns)(const Matrix& X, const int64_t* rows, int64_t C, int64_t H, int64_t p0, int64_t p1, float* out);
  // out: panels of M [K, H]; its rows k0 ... k1 - 1. rows[k] is the row of M, or row0 + k without `rows`.
  void (*pack_rows)(const Matrix& M, const int64_t* rows, int64_t row0, int64_t k0, int64_t k1, int64_t K, int64_t H,
                    float* out);
  void (*multiply)(const Product&);

  // tile = W[v0 ...] X^T, before bias and map. stage: tile.rows * stage floats, used if W is 16-bit.
  void (*logits)(const Matrix& W, const float* packed_columns, int64_t H, const Tile&, float* stage);
  // a -> z in place. With `max` [C]: max = max(max, z). With `sum` [C] too: sum *= exp(old max - new max).
  void (*finish)(const LogitMap&, const Tile&, float* max, double* sum);
  // sum[c] += sum_v exp(z - ref[c]); with `keep`, z becomes exp(z - ref) * dz/da / scale.
  void (*exponentials)(const LogitMap&, const Tile&, const float* ref, double* sum, bool keep, float* scratch);
  // z becomes G^T = coefficient[c] * (exp(z - lse[c]) - 1[v = label]) * dz/da / scale,
  // with coefficient = -scale * row weight. If grad_bias is given, grad_bias[v] += sum_c G.
  // scratch, here and above: 2 C floats.
  void (*gradient)(const LogitMap&, const Tile&, int64_t live, const int64_t* labels, const float* lse,
                   const float* coefficient, float* grad_bias, float* scratch);

  // logits -> kept rows of G^T and their pool, not settled yet: see tail.h. Returns the number of kept rows.
  int64_t (*pool)(const LogitMap&, const Tile&, int64_t live, const int64_t* labels, const float* lse,
                  const float* coefficient, float* grad_bias, float* scratch, const Tail&, float* to);
  // G^T -> the format in which products read it. `exponentials` and `gradient` do it themselves.
  void (*settle)(const Tile&, float* scratch);
  // out [H] = sum_v share[v] W[v0 + v] over the tail of a tile
  void (*tail_mean)(const Matrix& W, int64_t v0, int64_t rows, const float* share, int64_t H, float* out);
  // out[v] = share[v] x (or += with `add`) for the tail of a tile; out [rows, H]
  void (*spread_tail)(const float* share, int64_t rows, const float* x, int64_t H, bool add, float* out);

  // out = float16(z - reference), -inf below its lowest number; and back
  void (*narrow_logits)(const float* z, const float* reference, int64_t n, uint16_t* out);
  void (*widen_logits)(const uint16_t* kept, const float* reference, int64_t n, float* out);

  // float row -> row of a result: out = row (or out + row with `add`), rounded once.
  void (*store_row)(const float* row, int64_t H, bool add, Dtype dtype, void* out);
  // 16-bit or float row -> float
  void (*load_row)(const Matrix& M, int64_t row, int64_t H, float* out);
};

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);

// The kernels of each instruction set in this build (tile_kernels.cpp makes them through foreach_target.h).
namespace portable {
extern const TileKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TileKernels kKernels;
}
namespace avx512 {
extern const TileKernels kKernels;
}
namespace avx512_bf16 {
extern const TileKernels kKernels;
}
namespace amx {
extern const TileKernels kKernels;
}
#endif

// The kernels for inputs of this type on this machine, or those that INFOPO_KERNELS_CPU_ISA names. Throws a ValueError
// (errors.h) if the machine does not have them.
const TileKernels& select_kernels(Dtype);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t product_tasks(const TileKernels& k, int64_t M, int64_t N) {
  return ceil_div(N, k.panel) * ceil_div(M, k.row_group);
}

// Bytes of the panels of a matrix [K, N].
inline int64_t packed_size(const TileKernels& k, int64_t K, int64_t N) {
  return round_up(K, k.block) * round_up(N, k.lanes) * k.packed_bytes;
}

}  // namespace infopo
