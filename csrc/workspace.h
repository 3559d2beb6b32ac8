// The workspace of a call: one allocation, cut into the buffers that the call wants, as large as the bound allows.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

#include "linear_logprob.h"
#include "tile_kernels.h"

namespace infopo {

// Vocabulary entries of a tile, 96 = 16 register groups: W's part [96, depth] and the logits [96, C] stay in L2.
constexpr int64_t kTile = 96;

// Rows of a chunk: W and dW pass by once a chunk, so more is better until the panels of X leave L2 (2 MiB at H 576;
// 2 cores of Emerald Rapids: 193 GFLOP/s a core with 512 rows, 163 with 128).
constexpr int64_t kMostRows = 512;

// One allocation a call, handed out piece by piece; a first pass with no memory counts the bytes.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes)
      : data_(c10::GetCPUAllocator()->allocate(bytes)), base_(static_cast<char*>(data_.get())) {}

  template <typename T>
  T* take(int64_t n) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }

  int64_t used() const { return used_; }

 private:
  c10::DataPtr data_;
  char* base_ = nullptr;
  int64_t used_ = 0;
};

struct Sizes {
  int64_t C;        // rows of a chunk at most
  int64_t Vb;       // vocabulary entries of a block at most
  int64_t threads;  // that take part
};

// What a call keeps in its workspace.
struct Want {
  bool own_tiles = false;       // a tile of logits for each thread
  bool block = false;           // logits, then G, of a block
  bool all_logits = false;      // logits of a chunk over the whole vocabulary
  bool rows_panels = false;     // panels of X, for dW
  bool weight_rows = false;     // W for dX: panels of a block, unless it is read in place
  bool reduce = false;          // maxima and sums for each thread
  bool hidden_rows = false;     // float32 dX of a chunk
  int64_t all_hidden_rows = 0;  // float32 dX of that many rows
  bool weight_block = false;    // float32 dW of a block
};

// C: rows of a chunk, rounded up to whole vectors. Null where not wanted.
struct Buffers {
  int64_t ld;          // of z and of a tile
  float* columns;      // panels of X^T [H, C]
  float* rows;         // panels of X [C, H]
  float* weight;       // panels of W [Vb, H]
  float* z;            // logits or G [Vb or V, ld]
  float* tiles;        // [threads, kTile, ld]
  float* stage;        // [threads, kTile, depth], for a 16-bit W
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

  Buffers(Arena&, const TileKernels&, const Head&, const Sizes&, const Want&);
};

int64_t bytes_of(const TileKernels&, const Head&, const Sizes&, const Want&);

// Rows of a chunk of at most `most`, so that n rows make chunks of even size: 600 rows are 2 x 300, not 512 + 88.
int64_t even_size(int64_t n, int64_t most, int64_t lanes);

// The largest sizes that fit: rows before block before threads. False if none does.
bool find_sizes(const TileKernels&, const Head&, int64_t n, const Want&, Sizes&);

// Throws c10::ValueError if none does.
Sizes require_sizes(const TileKernels&, const Head&, int64_t n, const Want&);

}  // namespace infopo
