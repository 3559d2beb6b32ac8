// Products of bfloat16 in tile registers (AMX). A tile register holds 16 rows of 64 bytes: 16 x 16 floats of a result,
// 16 rows of A with 32 numbers along K, or 16 rows of a panel with 16 pairs. One instruction adds the product of 16 x 32
// and 32 x 16 numbers to a result. Everything is padded with zeros to 32 x 32: two tile registers each way.
//
//     panels            [K / 2][32][2]
//     W for the logits  staged as [K / 32][32 rows][32 numbers]
//     a settled tile    each block of 32 rows v and 32 columns c of float G^T is rounded once to bfloat16 and stored in
//                       two forms, one for each way of reading, in the memory of the block. Line i of 32 holds
//                         [G_v0+i, c0 ... c0 + 31]    A by row
//                         [G_v0 ... v0 + 31, c0+i]    A by column, stored if t.by_column

namespace infopo::INFOPO_ISA {
namespace {

constexpr int kBlock = 32, kGroup = kBlock, kPanel = kBlock, kColumns = kBlock;

constexpr int64_t kTile = 192;

// K block: the rows of a panel, 40 KiB at most, stay in L1 while rows of A pass. H 576 is one block.
constexpr int kDepth = 640, kStage = kDepth / 2;

constexpr int kFewestStoredRows = 512;

// The tile of G of a block stays in L2 (2 MiB).
constexpr int64_t kMostBlock = 384;

constexpr int64_t kRowBytes = 64, kPairsBytes = kPanel * 4;  // of a row of A; of a row of a panel
constexpr int64_t kStepBytes = 16 * kPairsBytes;             // of 32 rows of a panel

// All tile registers have 16 rows of 64 bytes while this lives.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) static constexpr struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } kShape;
    _tile_loadconfig(&kShape);
  }
  ~TileRegisters() { _tile_release(); }
};

// The compiler does not know that tile loads read memory.
INFOPO_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

INFOPO_INLINE void clear_result() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Rows of the result are `stride` bytes apart, here and below.
INFOPO_INLINE void load_result(const float* from, int64_t stride) {
  const char* p = reinterpret_cast<const char*>(from);
  _tile_loadd(0, p, stride);
  _tile_loadd(1, p + 64, stride);
  _tile_loadd(2, p + 16 * stride, stride);
  _tile_loadd(3, p + 16 * stride + 64, stride);
}

INFOPO_INLINE void store_result(float* to, int64_t stride) {
  char* p = reinterpret_cast<char*>(to);
  _tile_stored(0, p, stride);
  _tile_stored(1, p + 64, stride);
  _tile_stored(2, p + 16 * stride, stride);
  _tile_stored(3, p + 16 * stride + 64, stride);
}

// Adds A B to the result [32, 32], over `steps` times 32 numbers along K. Rows of A are `a_row` bytes apart, steps
// `a_step` bytes. Each step calls beside(s): other work, for which the processor has time beside the tile registers.
template <typename Beside>
INFOPO_INLINE void add_product(int64_t steps, const char* a, int64_t a_row, int64_t a_step, const char* b,
                               const Beside& beside) {
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, b, kPairsBytes);
    _tile_loadd(4, a, a_row);
    _tile_loadd(7, b + 64, kPairsBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + 16 * a_row, a_row);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a += a_step;
    b += kStepBytes;
    beside(s);
  }
}

// A result in memory that has still to be added to rows of the output, or assigned.
struct Pending {
  alignas(64) float result[kGroup][kPanel];
  float* const* out = nullptr;
  int64_t rows = 0, n0, columns;
  bool accumulate;

  INFOPO_INLINE void write_row(int64_t i) const {
    float* to = out[i] + n0;
    if (columns == kPanel) {
      const Vec first = load(result[i]), second = load(result[i] + kLanes);
      store(to, accumulate ? load(to) + first : first);
      store(to + kLanes, accumulate ? load(to + kLanes) + second : second);
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = accumulate ? to[j] + result[i][j] : result[i][j];
    }
  }
};

// A is a settled tile.
void multiply(const Product& p) {
  const TileRegisters tiles;
  const int64_t groups = ceil_div(p.M, kGroup), all_steps = ceil_div(p.K, kBlock), row = p.lda * 4;
  const int64_t depth = ceil_div(all_steps, ceil_div(all_steps, kDepth / kBlock)),
                padded_K = round_up(p.b_rows, kBlock);
  // of a block of 32 rows along M; of a block along K
  const int64_t m_bytes = p.a_by_column ? 2 * kRowBytes : kBlock * row;
  const int64_t k_bytes = p.a_by_column ? kBlock * row : 2 * kRowBytes;
  const char* A = reinterpret_cast<const char*>(p.a) + (p.a_by_column ? kRowBytes : 0);
  // The result of a task is written during the steps of the next one, so that the tile registers do not wait for it.
  Pending pending[2];
  int64_t current = 0;
  finish_stores();
  for (int64_t k0 = 0; k0 < all_steps; k0 += depth) {
    const int64_t steps = least(depth, all_steps - k0), rows_a_step = ceil_div(kGroup, steps);
    for (int64_t task = p.task_begin; task < p.task_end; ++task) {
      const int64_t n0 = task / groups * kPanel, m = task % groups;
      Pending& own = pending[current];
      const Pending& previous = pending[current ^= 1];
      const char* b = reinterpret_cast<const char*>(p.b) + n0 * padded_K * 2 + (p.b_row0 / kBlock + k0) * kStepBytes;
      own.out = p.out + m * kGroup;
      own.rows = least(kGroup, p.M - m * kGroup);
      own.n0 = n0;
      own.columns = least(kPanel, p.N - n0);
      own.accumulate = p.accumulate || k0 > 0;
      clear_result();
      add_product(steps, A + m * m_bytes + k0 * k_bytes, row, k_bytes, b, [&](int64_t s) {
        const int64_t begin = s * rows_a_step, end = begin + rows_a_step;
        for (int64_t i = begin; i < least(end, previous.rows); ++i) previous.write_row(i);
        if (!own.accumulate) return;
        for (int64_t i = begin; i < least(end, own.rows); ++i) {
          __builtin_prefetch(own.out[i] + n0, 1);
          __builtin_prefetch(own.out[i] + n0 + kLanes, 1);
        }
      });
      store_result(own.result[0], sizeof own.result[0]);
    }
  }
  const Pending& last = pending[current ^ 1];
  for (int64_t i = 0; i < last.rows; ++i) last.write_row(i);
}

void settle(const Tile& t, float*) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t v0 = 0; v0 < t.rows; v0 += kBlock) {
    for (int64_t c0 = 0; c0 < t.C; c0 += kBlock) {
      float* block = t.z + v0 * t.ld + c0;
      const int64_t rows = least(kBlock, t.rows - v0);
      for (int64_t i = 0; i < kBlock; ++i) {
        float* line = block + i * t.ld;
        _mm512_storeu_si512(line, i < rows ? round_to_bf16(load(line), load(line + kLanes)) : zero);
      }
      if (!t.by_column) continue;
      // Row c of the second form is a column of the first. Words of two numbers are transposed, low halves of each
      // quarter of a line first.
      for (int high = 0; high < 2; ++high) {
        __m512i words[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const __m512i first = _mm512_loadu_si512(block + 2 * i * t.ld);
          const __m512i second = _mm512_loadu_si512(block + (2 * i + 1) * t.ld);
          words[i] = high ? _mm512_unpackhi_epi16(first, second) : _mm512_unpacklo_epi16(first, second);
        }
        transpose_words(words);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int c = i / 4 * 8 + high * 4 + i % 4;
          _mm512_storeu_si512(block + c * t.ld + kLanes, words[i]);
        }
      }
    }
  }
}

INFOPO_INLINE void put_settled(const Tile& t, int64_t v, int64_t c, float x) {
  const int64_t i = v % kBlock, j = c % kBlock;
  float* block = t.z + (v - i) * t.ld + (c - j);
  const uint16_t rounded = float_to_bf16(x);
  reinterpret_cast<uint16_t*>(block + i * t.ld)[j] = rounded;
  if (t.by_column) reinterpret_cast<uint16_t*>(block + j * t.ld)[kBlock + i] = rounded;
}

// Asks for lines of rows that are needed next, one after the other: the prefetcher of the processor then goes ahead.
class Ahead {
 public:
  Ahead(const uint16_t* first, int64_t stride, int64_t rows, int64_t lines)
      : row_(first), stride_(stride), rows_(rows), lines_(lines) {}

  INFOPO_INLINE void ask(int64_t n) {
    for (; n > 0 && rows_ > 0; --n) {
      __builtin_prefetch(row_ + line_ * kBlock, 0, 2);
      if (++line_ < lines_) continue;
      line_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const uint16_t* row_;
  int64_t stride_, rows_, lines_, line_ = 0;
};

void logits(const Matrix& W, const float* packed_columns, int64_t H, const Tile& tile, float* stage) {
  const TileRegisters tiles;
  const int64_t padded_H = round_up(H, kBlock), groups = ceil_div(tile.rows, kGroup);
  const int64_t all_steps = padded_H / kBlock, depth = ceil_div(all_steps, ceil_div(all_steps, kDepth / kBlock));
  const uint16_t* rows = static_cast<const uint16_t*>(W.data) + tile.v0 * W.stride;
  // W in place: no row or number is missing in a block.
  const bool in_place = H % kBlock == 0 && tile.rows % kBlock == 0;
  const char* A = in_place ? reinterpret_cast<const char*>(rows) : reinterpret_cast<const char*>(stage);
  const char* panels = reinterpret_cast<const char*>(packed_columns);
  const int64_t z_row = tile.ld * 4, group_bytes = depth * kGroup * kRowBytes;
  for (int64_t k0 = 0; k0 < all_steps; k0 += depth) {
    const int64_t steps = least(depth, all_steps - k0);
    if (!in_place) {
      for (int64_t v = 0; v < groups * kGroup; ++v) {
        char* to = reinterpret_cast<char*>(stage) + v / kGroup * group_bytes + v % kGroup * kRowBytes;
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t h = (k0 + s) * kBlock;
          _mm512_storeu_si512(to + s * kGroup * kRowBytes,
                              v < tile.rows ? load_numbers(rows + v * W.stride + h, H - h) : _mm512_setzero_si512());
        }
      }
    }
    finish_stores();
    // The numbers of W that come next are not in the cache: those of the next K block, or the first of the next tile.
    const bool last = k0 + steps == all_steps;
    const int64_t next_steps = last ? depth : least(depth, all_steps - k0 - steps);
    Ahead ahead(rows + (last ? tile.rows * W.stride : (k0 + steps) * kBlock), W.stride, tile.rows, next_steps);
    const int64_t lines_a_step = ceil_div(tile.rows * next_steps, groups * ceil_div(tile.C, kPanel) * steps);
    for (int64_t c0 = 0; c0 < tile.C; c0 += kPanel) {
      const char* b = panels + c0 * padded_H * 2 + k0 * kStepBytes;
      for (int64_t g = 0; g < groups; ++g) {
        float* z = tile.z + g * kGroup * tile.ld + c0;
        k0 > 0 ? load_result(z, z_row) : clear_result();
        const char* a = in_place ? A + g * kGroup * W.stride * 2 + k0 * kRowBytes : A + g * group_bytes;
        add_product(steps, a, in_place ? W.stride * 2 : kRowBytes, in_place ? kRowBytes : kGroup * kRowBytes, b,
                    [&](int64_t) { ahead.ask(lines_a_step); });
        store_result(z, z_row);
      }
    }
  }
}

}  // namespace
}  // namespace infopo::INFOPO_ISA
