// The workspace of a call: one allocation, divided into the wanted buffers, as large as the bound allows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "linear_logprob.h"
#include "logit_store.h"
#include "tile_kernels.h"

namespace infopo {

// Rows of a chunk. Each chunk reads W and dW once, so more rows are better until the panels of X no longer fit L2 (2
// MiB at H 576; 2 cores of Emerald Rapids: 193 GFLOP/s a core with 512 rows, 163 with 128).
constexpr int64_t kMostRows = 512;

// One allocation for each call, handed out piece by piece. A first pass without memory counts the bytes.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) {
    data_.reset(std::aligned_alloc(64, round_up(bytes, 64)));
    if (!data_ && bytes > 0) throw std::bad_alloc();
    base_ = static_cast<char*>(data_.get());
  }

  template <typename T>
  T* take(int64_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

  int64_t used() const { return used_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

struct Sizes {
  int64_t C;        // most rows of a chunk
  int64_t Vb;       // most vocabulary entries of a block
  int64_t threads;  // number of threads that take part
};

// The buffers that a call wants in its workspace.
struct Want {
  bool own_tiles = false;       // a tile of logits for each thread
  bool block = false;           // logits, then G, of a block
  bool all_logits = false;      // logits of a chunk over the whole vocabulary
  bool narrow_logits = false;   // the same as 16-bit numbers, in a store of their own
  bool rows_panels = false;     // panels of X, for dW
  bool weight_rows = false;     // W for dX: panels of a block, unless it is read in place
  bool reduce = false;          // maxima and sums for each thread
  bool hidden_rows = false;     // float32 dX of a chunk
  int64_t all_hidden_rows = 0;  // float32 dX of that many rows
  bool weight_block = false;    // float32 dW of a block
  bool tail = false;            // what a pooled tail needs
};

// Rows of W that are gathered for dX at a time, at most.
constexpr int64_t kPiece = 384;

// Buffers of a pooled tail. "Compact rows" are the kept rows of G^T and the pools, at the front of a thread's part.
struct TailBuffers {
  float* share;    // [Vb]
  int64_t* words;  // [Vb] what a compact row stands for
  float** out;     // [Vb] the row of dW, or of `pools`, to which a compact row adds
  float* pools;    // [tiles of a block, H] gradients of the pools' mean rows
  float* means;    // [tiles of a block, H] mean rows of W
  int64_t piece;   // rows that are gathered at a time: kPiece, or the rows of a smaller block
  void* gathered;  // [piece, stride] floats, or [piece, H] of the type of W if there are panels
  int64_t stride;
  float* panels;    // of `gathered`, unless products read it in place
  float* rows;      // [threads, 2, C]
  int64_t* counts;  // [threads, 2] compact rows and kept rows
};

// C: rows of a chunk, rounded up to whole vectors. A buffer that is not wanted is null.
struct Buffers {
  int64_t ld;          // of z and of a tile
  float* columns;      // panels of X^T [H, C]
  float* rows;         // panels of X [C, H]
  float* weight;       // panels of W [Vb, H]
  float* z;            // logits or G [Vb or V, ld]
  float* tiles;        // [threads, tile, ld]
  LogitStore store;    // of narrow logits [V, C]
  float* stage;        // [threads, tile, stage], for a 16-bit W
  float* scratch;      // [threads, 2, C]
  float* max;          // [threads, C]
  double* sum;         // [threads, C]
  float* hidden;       // float32 dX [rows of a chunk, or of all, H]
  float* weight_sum;   // float32 dW [Vb, H]
  double* total;       // [C] sums over threads
  float* lse;          // [C]
  float* coefficient;  // [C]
  float* target;       // [C] logits of the labels
  int64_t* labels;     // [C]
  TailBuffers tail;

  Buffers(Arena&, const TileKernels&, const Head&, const Sizes&, const Want&);
};

// Whether dX can read W in place: W is float32, H is a whole number of vectors, and the rows are spread over the cache
// (2 cores of Emerald Rapids, 128 rows, H 576: 164 GFLOP/s a core, 130 if W is packed).
bool reads_weight_in_place(const TileKernels&, const Head&);

int64_t bytes_of(const TileKernels&, const Head&, const Sizes&, const Want&);

// Number of rows of a chunk, at most `most`, that divides n rows into equal chunks: 600 rows are 2 x 300, not 512 + 88.
int64_t even_size(int64_t n, int64_t most, int64_t lanes);

// Finds the largest sizes that fit. Reduces rows and block first, then threads. Returns false if no size fits.
bool find_sizes(const TileKernels&, const Head&, int64_t n, const Want&, Sizes&);

// As `find_sizes`; throws a ValueError (errors.h) if no size fits.
Sizes require_sizes(const TileKernels&, const Head&, int64_t n, const Want&);

}  // namespace infopo
