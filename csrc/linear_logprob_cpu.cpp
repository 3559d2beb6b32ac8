// The three primitives as loops over chunks of C rows and blocks of Vb vocabulary entries (products of size N V H):
//
//   logprob                          rows outside; each thread takes a slice of the vocabulary              1
//   logprob_and_grad, dX only        rows outside; a block's exponentials, relative to the largest logit    2
//                                    so far, meet W at once: dX = c (dz/da W_y - sum_v e_v W_v / sum_v e_v)
//   logprob_and_grad, float32 dW     rows outside; the chunk's logits [V, C] stay in the workspace          3
//   backward                         vocabulary outside, rows inside: a block of dW is finished and         3 (2 with
//                                    rounded before the next begins; dX adds up in float32                  one result)
//   logprob_and_grad, 16-bit dW      the second, then the fourth for dW alone                               4
//   backward, 16-bit dX too large    the fourth for dX alone (rows outside), then for dW alone              4
//   for the workspace
//
// Rows whose logits `logprob` kept in the memory of dW cost `backward` one product less: each tile takes them from there
// before it writes its own rows of dW.
//
// Work is split among threads by place (of the vocabulary, then of the result), partial sums are merged in order: the
// result depends on the number of threads, never on their timing.

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "errors.h"
#include "linear_logprob.h"
#include "threads.h"

namespace infopo {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Vocabulary entries of a tile, 96 = 16 register groups: W's part [96, depth] and the logits [96, C] stay in L2.
constexpr int64_t kTile = 96;

// Rows of a chunk: W and dW pass by once a chunk, so more is better until the panels of X leave L2 (2 MiB at H 576;
// 2 cores of Emerald Rapids: 193 GFLOP/s a core with 512 rows, 163 with 128).
constexpr int64_t kMostRows = 512;

// Below this many rows the third way loses to recomputing logits: dW comes and goes through memory once a chunk
// (2 cores of Emerald Rapids: the dW product runs at 160 GFLOP/s a core with 128 rows, 80 with 48).
constexpr int64_t kFewestStoredRows = 64;

// Below this many slots for logits in the memory of dW another pass over W costs more than the product it saves.
constexpr int64_t kFewestKeptRows = 64;

// Rows of W whose distance is a multiple of this fall into the same few cache sets and have to be packed.
constexpr int64_t kPageBytes = 4096;

// A running reference may lag behind the largest logit by this much before sums are rescaled: exp(16) is harmless.
constexpr float kLag = 16;

// ---------------------------------------------------------------------------------------------------------- threads

// Subnormal numbers count as 0 while a kernel runs on this thread. A rejected sequence about to underflow (log-weight
// -70 to -90) fills G with them, each worth a microcode trap: 36 to 56 s for a call that takes 1.7 s without (N 256,
// H 576, V 49152, Emerald Rapids). What is lost is below 1.2e-38.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ and DAZ
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}  // other processors take them at full speed
#endif
};

template <typename F>
void on_threads(int64_t threads, const F& f) {
  parallel_for(threads, [&](int64_t begin, int64_t end) {
    const FlushSubnormals guard;
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

struct Range {
  int64_t begin, end;
};

// Part t of [0, n): whole multiples of `align`, as even as they allow.
Range part(int64_t n, int64_t threads, int64_t t, int64_t align = 1) {
  const int64_t units = ceil_div(n, align);
  return {std::min(n, units * t / threads * align), std::min(n, units * (t + 1) / threads * align)};
}

// -------------------------------------------------------------------------------------------------------- workspace

// One allocation a call, handed out piece by piece; a first pass with no memory counts the bytes.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : data_(std::aligned_alloc(64, round_up(bytes, 64))), base_(static_cast<char*>(data_.get())) {
    if (!base_ && bytes > 0) throw std::bad_alloc();
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

// W can serve dX as it stands: float32, whole vectors, rows spread over the cache (2 cores of Emerald Rapids, 128 rows,
// H 576: 164 GFLOP/s a core, 130 with W packed on the way).
bool reads_weight_in_place(const TileKernels& k, const Head& p) {
  return p.weight.dtype == Dtype::kFloat32 && p.H % k.lanes == 0 &&
         p.weight.stride * static_cast<int64_t>(sizeof(float)) % kPageBytes != 0;
}

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

struct Buffers {
  float *columns, *rows, *weight, *z, *tiles, *stage, *scratch, *max, *hidden, *weight_sum;
  float *lse, *coefficient, *target;
  double *sum, *total;
  int64_t* labels;
  int64_t ld;  // of z and of a tile

  Buffers(Arena& arena, const TileKernels& k, const Head& p, const Sizes& s, const Want& want) {
    const int64_t C = round_up(s.C, k.lanes);
    ld = C + k.lanes;  // not a power of two: rows of a tile must not share cache sets
    columns = arena.take<float>(packed_size(k, p.H, C));
    rows = want.rows_panels ? arena.take<float>(packed_size(k, C, p.H)) : nullptr;
    weight = want.weight_rows && !reads_weight_in_place(k, p) ? arena.take<float>(packed_size(k, s.Vb, p.H)) : nullptr;
    z = want.all_logits || want.block ? arena.take<float>(round_up(want.all_logits ? p.V : s.Vb, 2) * ld) : nullptr;
    tiles = want.own_tiles ? arena.take<float>(s.threads * kTile * ld) : nullptr;
    stage = p.weight.dtype == Dtype::kFloat32 ? nullptr : arena.take<float>(s.threads * kTile * k.depth);
    scratch = arena.take<float>(s.threads * 2 * C);
    max = want.reduce ? arena.take<float>(s.threads * C) : nullptr;
    sum = want.reduce ? arena.take<double>(s.threads * C) : nullptr;
    const int64_t hidden_rows = std::max(want.all_hidden_rows, want.hidden_rows ? s.C : 0);
    hidden = hidden_rows ? arena.take<float>(hidden_rows * p.H) : nullptr;
    weight_sum = want.weight_block ? arena.take<float>(s.Vb * p.H) : nullptr;
    total = arena.take<double>(C);
    lse = arena.take<float>(C);
    coefficient = arena.take<float>(C);
    target = arena.take<float>(C);
    labels = arena.take<int64_t>(C);
  }
};

int64_t bytes_of(const TileKernels& k, const Head& p, const Sizes& s, const Want& want) {
  Arena counter;
  Buffers(counter, k, p, s, want);
  return counter.used();
}

// Rows of a chunk of at most `most`, so that n rows make chunks of even size: 600 rows are 2 x 300, not 512 + 88.
int64_t even_size(int64_t n, int64_t most, int64_t lanes) {
  return std::min(most, round_up(ceil_div(n, ceil_div(n, std::min(n, most))), lanes));
}

// The largest sizes that fit: rows before block before threads, along a ladder on which both grow together.
bool find_sizes(const TileKernels& k, const Head& p, int64_t n, const Want& want, Sizes& sizes) {
  constexpr Sizes kLadder[] = {{kMostRows, 3072, 0}, {kMostRows, 2048, 0}, {kMostRows, 1024, 0}, {256, 1024, 0},
                               {256, 512, 0},        {128, 512, 0},        {128, 256, 0},        {64, 256, 0},
                               {48, 192, 0},         {32, 96, 0},          {16, 96, 0},          {16, 48, 0},
                               {16, 16, 0},          {1, 16, 0}};
  for (int64_t threads = num_threads(); threads >= 1; threads /= 2) {
    for (const Sizes& step : kLadder) {
      sizes = {even_size(n, step.C, k.lanes), std::min(step.Vb, p.V), threads};
      if (bytes_of(k, p, sizes, want) <= p.workspace_bytes) return true;
    }
  }
  return false;
}

Sizes require_sizes(const TileKernels& k, const Head& p, int64_t n, const Want& want) {
  Sizes sizes{};
  if (!find_sizes(k, p, n, want, sizes)) {
    value_error("`workspace_mib` is too small for hidden size ", p.H, ": one row at a time needs ",
                bytes_of(k, p, sizes, want), " bytes, got ", p.workspace_bytes, "; raise it.");
  }
  return sizes;
}

// ------------------------------------------------------------------------------------------------------------ chunks

// One call: sizes, buffers, and the chunk of rows that the buffers hold at the moment.
class Call {
 public:
  Call(const TileKernels& kernels, const Head& head, const int64_t* labels, int64_t n, const Want& want)
      : k(kernels),
        p(head),
        sizes(require_sizes(kernels, head, n, want)),
        arena_(bytes_of(kernels, head, sizes, want)),
        b(arena_, kernels, head, sizes, want),
        want_(want),
        labels_(labels) {}

  const TileKernels& k;
  const Head& p;
  const Sizes sizes;

 private:
  Arena arena_;

 public:
  const Buffers b;
  const int64_t* rows = nullptr;   // [live] rows of X in this chunk
  int64_t live = 0;                // of them
  int64_t C = 0;                   // live rounded up to whole vectors
  const int64_t* slots = nullptr;  // [live] where the store has their logits, ascending; or null

  // Pack chunk_rows[0 ... n) unless they are what is packed already.
  void load_chunk(const int64_t* chunk_rows, int64_t n, const int64_t* chunk_slots = nullptr) {
    if (chunk_rows == rows) return;
    rows = chunk_rows;
    slots = chunk_slots;
    live = n;
    C = round_up(n, k.lanes);
    for (int64_t c = 0; c < C; ++c) b.labels[c] = c < live ? labels_[rows[c]] : kIgnoreIndex;
    const int64_t panels = ceil_div(live, k.panel);
    on_threads(sizes.threads, [&](int64_t t) {
      const Range own = part(panels, sizes.threads, t), own_rows = part(live, sizes.threads, t);
      if (!slots) k.pack_columns(p.hidden, rows, live, p.H, own.begin, own.end, b.columns);
      if (want_.rows_panels) k.pack_rows(p.hidden, rows, 0, own_rows.begin, own_rows.end, live, p.H, b.rows);
    });
  }

  // f(tile of vocabulary entries) for each tile of [v0, v1) that is thread t's
  template <typename F>
  void for_own_tiles(int64_t t, int64_t v0, int64_t v1, float* z, const F& f) const {
    const Range own = part(v1 - v0, sizes.threads, t, k.row_group);
    for (int64_t v = own.begin; v < own.end; v += kTile) {
      f(Tile{z ? z + v * b.ld : b.tiles + t * kTile * b.ld, b.ld, std::min(kTile, own.end - v), C, v0 + v});
    }
  }

  float* scratch(int64_t t) const { return b.scratch + t * 2 * C; }
  float* stage(int64_t t) const { return b.stage ? b.stage + t * kTile * k.depth : nullptr; }
  float* max(int64_t t) const { return b.max + t * C; }
  double* sum(int64_t t) const { return b.sum + t * C; }

  void reset_reduction() const {
    std::fill_n(b.max, sizes.threads * C, -kInfinity);
    std::fill_n(b.sum, sizes.threads * C, 0.0);
    std::fill_n(b.target, C, kNaN);  // stays NaN for a label outside the vocabulary
  }

  void pick_targets(const Tile& tile) const {
    for (int64_t c = 0; c < live; ++c) {
      const int64_t v = b.labels[c] - tile.v0;
      if (v >= 0 && v < tile.rows) b.target[c] = tile.z[v * tile.ld + c];
    }
  }

  // l and lse of the chunk's rows, from the largest logit m and s = sum_v exp(z_v - m).
  // An infinite lse comes of an infinite logit: no probability is defined then.
  void write_logprob(int64_t c, double m, double s, float* l, float* lse) const {
    const double value = m + std::log(s);
    b.lse[c] = std::isfinite(value) ? static_cast<float>(value) : kNaN;
    lse[rows[c]] = b.lse[c];
    l[rows[c]] = std::isfinite(value) ? static_cast<float>(b.target[c] - value) : kNaN;
  }

  void merge_threads(float* l, float* lse) const {
    for (int64_t c = 0; c < live; ++c) {
      double m = -kInfinity, s = 0;
      for (int64_t t = 0; t < sizes.threads; ++t) m = std::max(m, static_cast<double>(max(t)[c]));
      for (int64_t t = 0; t < sizes.threads; ++t) {
        const double s_t = sum(t)[c];
        if (s_t != 0) s += s_t * std::exp(max(t)[c] - m);
      }
      write_logprob(c, m, s, l, lse);
    }
  }

  // The tile's logits to slots first ... first + live - 1 of the store.
  void keep(const Tile& tile, const LogitStore& store, int64_t first) const {
    for (int64_t v = 0; v < tile.rows; ++v) {
      std::memcpy(store.row(tile.v0 + v) + first, tile.z + v * tile.ld, live * sizeof(float));
    }
  }

  // And back. Padded columns become 0: whatever memory held before, a weight of 0 must not turn it into NaN.
  void take_back(const Tile& tile, const LogitStore& store) const {
    const bool adjacent = slots[live - 1] - slots[0] == live - 1;
    for (int64_t v = 0; v < tile.rows; ++v) {
      const float* from = store.row(tile.v0 + v);
      float* to = tile.z + v * tile.ld;
      if (adjacent) {
        std::memcpy(to, from + slots[0], live * sizeof(float));
      } else {
        for (int64_t c = 0; c < live; ++c) to[c] = from[slots[c]];
      }
      std::fill(to + live, to + C, 0.f);
    }
  }

  // Logits of the whole vocabulary, reduced to l and lse of the chunk's rows; kept [V, C] if the workspace has them, or
  // in slots first ... of the store.
  void reduce(float* l, float* lse, const LogitStore& store = {}, int64_t first = 0) const {
    reset_reduction();
    on_threads(sizes.threads, [&](int64_t t) {
      for_own_tiles(t, 0, p.V, want_.all_logits ? b.z : nullptr, [&](const Tile& tile) {
        k.logits(p.weight, b.columns, p.H, tile, stage(t));
        k.finish(p.map, tile, max(t), sum(t));
        pick_targets(tile);
        if (store.data) keep(tile, store, first);
        k.exponentials(p.map, tile, max(t), sum(t), false, nullptr);
      });
    });
    merge_threads(l, lse);
  }

  // The chunk's row weights and, for a given logsumexp, that. Padded columns weigh nothing, whatever their logits.
  void load_weights(const float* row_weight, const float* lse) const {
    for (int64_t c = 0; c < C; ++c) {
      b.coefficient[c] = c < live ? -p.map.scale * row_weight[rows[c]] : 0;
      if (lse || c >= live) b.lse[c] = c < live ? lse[rows[c]] : kInfinity;
    }
  }

  // What is wanted of a block of vocabulary entries [v0, v1): dW and db of each tile while it is warm, panels of W.
  // `have_logits`: z holds them already. `store`: where they are taken from if the chunk has slots there.
  void weight_gradient(int64_t v0, int64_t v1, float* z, bool have_logits, float* dW, bool add, float* db,
                       const LogitStore& store = {}) const {
    on_threads(sizes.threads, [&](int64_t t) {
      for_own_tiles(t, v0, v1, z, [&](const Tile& tile) {
        if (slots) {
          take_back(tile, store);
        } else if (!have_logits) {
          k.logits(p.weight, b.columns, p.H, tile, stage(t));
          k.finish(p.map, tile, nullptr, nullptr);
        }
        k.gradient(p.map, tile, live, b.labels, b.lse, b.coefficient, db, scratch(t));
        if (dW) {
          float* out[kTile];
          for (int64_t v = 0; v < tile.rows; ++v) out[v] = dW + (tile.v0 - v0 + v) * p.H;
          k.multiply({tile.rows, p.H, live, tile.z, tile.ld, false, b.rows, 0, live, 0, out, add, 0,
                      product_tasks(k, tile.rows, p.H)});
        }
        pack_weight(tile, v0, v1);
      });
    });
  }

  void pack_weight(const Tile& tile, int64_t v0, int64_t v1) const {
    if (b.weight) {
      k.pack_rows(p.weight, nullptr, v0, tile.v0 - v0, tile.v0 - v0 + tile.rows, v1 - v0, p.H, b.weight);
    }
  }

  // out[c] += sum_v z[v][c] W[v] over a block (its panels packed, or W as it stands).
  void hidden_gradient(int64_t v0, int64_t v1, const float* z, float* const* out) const {
    const int64_t tasks = product_tasks(k, live, p.H);
    on_threads(sizes.threads, [&](int64_t t) {
      const Range own = part(tasks, sizes.threads, t);
      Product product{live, p.H, v1 - v0, z, b.ld, true, b.weight, 0, v1 - v0, 0, out, true, own.begin, own.end};
      if (!b.weight) {
        product.b = static_cast<const float*>(p.weight.data) + v0 * p.weight.stride;
        product.ldb = p.weight.stride;
      }
      k.multiply(product);
    });
  }

 private:
  const Want want_;
  const int64_t* labels_;
};

// Memory that is about to be written for the first time, mapped in one go. Page faults in the midst of products cost
// more than the pages: 2.7 s instead of 2.0 for `backward` of 512 rows with a float32 dW of 1 GiB (2 cores of Emerald
// Rapids, virtual machine). Systems without the call fault as usual.
void populate(void* data, int64_t bytes, int64_t threads) {
#if defined(MADV_POPULATE_WRITE)
  const int64_t page = sysconf(_SC_PAGESIZE);
  char* const first = static_cast<char*>(data) - reinterpret_cast<uintptr_t>(data) % page;
  on_threads(threads, [&](int64_t t) {
    const Range own = part(static_cast<char*>(data) + bytes - first, threads, t, page);
    if (own.begin < own.end) madvise(first + own.begin, own.end - own.begin, MADV_POPULATE_WRITE);
  });
#endif
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

void* row_of(void* data, Dtype dtype, int64_t row, int64_t H) {
  return static_cast<char*>(data) + row * H * element_size(dtype);
}

template <typename Keep>
std::vector<int64_t> select_rows(int64_t N, const Keep& keep) {
  std::vector<int64_t> rows;
  rows.reserve(N);
  for (int64_t t = 0; t < N; ++t) {
    if (keep(t)) rows.push_back(t);
  }
  return rows;
}

// Where float32 rows of dX add up: the result itself if it is float32, else rows of the workspace.
class HiddenSums {
 public:
  HiddenSums(const Call& call, void* result) : call_(call), result_(result) {}

  // Pointers for the chunk's rows; `first` is the chunk's place among the accumulator's rows.
  float* const* rows(int64_t first) {
    pointers_.resize(call_.live);
    for (int64_t c = 0; c < call_.live; ++c) {
      pointers_[c] = direct() ? static_cast<float*>(result_) + call_.rows[c] * call_.p.H
                              : call_.b.hidden + (first + c) * call_.p.H;
    }
    return pointers_.data();
  }

  void clear(int64_t first) {
    float* const* row = rows(first);
    for_rows([&](int64_t c) { std::memset(row[c], 0, call_.p.H * sizeof(float)); });
  }

  void round_into_result(int64_t first) {
    if (direct()) return;
    const Dtype dtype = call_.p.hidden.dtype;
    float* const* row = rows(first);
    for_rows([&](int64_t c) {
      call_.k.store_row(row[c], call_.p.H, false, dtype, row_of(result_, dtype, call_.rows[c], call_.p.H));
    });
  }

  template <typename F>
  void for_rows(const F& f) const {
    on_threads(call_.sizes.threads, [&](int64_t t) {
      const Range own = part(call_.live, call_.sizes.threads, t);
      for (int64_t c = own.begin; c < own.end; ++c) f(c);
    });
  }

 private:
  bool direct() const { return call_.p.hidden.dtype == Dtype::kFloat32; }

  const Call& call_;
  void* result_;
  std::vector<float*> pointers_;
};

// f(first) for each chunk; `slots` are those of the rows in a store, if they have some.
template <typename F>
void for_chunks(Call& call, const std::vector<int64_t>& rows, const F& f, const std::vector<int64_t>& slots = {}) {
  const int64_t n = static_cast<int64_t>(rows.size());
  if (n == 0) return;
  const int64_t C = even_size(n, call.sizes.C, call.k.lanes);
  for (int64_t first = 0; first < n; first += C) {
    call.load_chunk(rows.data() + first, std::min(C, n - first), slots.empty() ? nullptr : slots.data() + first);
    f(first);
  }
}

template <typename F>
void for_blocks(const Call& call, const F& f) {
  for (int64_t v0 = 0; v0 < call.p.V; v0 += call.sizes.Vb) f(v0, std::min(call.p.V, v0 + call.sizes.Vb));
}

std::vector<int64_t> scored_rows(const Head& p, const int64_t* labels) {
  return select_rows(p.N, [&](int64_t t) { return labels[t] != kIgnoreIndex; });
}

// ----------------------------------------------------------------------------------------------------------- schedules

// dX alone from one pass: exponentials relative to a running reference r meet W before their sum is known,
//     u_t = sum_v exp(z_tv - r_t) s_tv W_v,   S_t = sum_v exp(z_tv - r_t),   dX_t = c_t scale (s_ty W_y - u_t / S_t),
// with s = dz/da / scale; when r rises, u and S shrink by exp(old r - new r).
void hidden_from_one_pass(const TileKernels& k, const Head& p, const int64_t* labels, const std::vector<int64_t>& rows,
                          const float* row_weight, void* dX, float* l, float* lse) {
  Want want;
  want.block = want.weight_rows = want.reduce = true;
  want.hidden_rows = p.hidden.dtype != Dtype::kFloat32;
  Call call(k, p, labels, static_cast<int64_t>(rows.size()), want);
  HiddenSums sums(call, dX);
  const Buffers& b = call.b;
  const int64_t threads = call.sizes.threads, H = p.H;
  for_chunks(call, rows, [&](int64_t) {
    sums.clear(0);
    float* const* u = sums.rows(0);
    call.reset_reduction();
    float* reference = b.lse;
    std::fill_n(reference, call.C, -kInfinity);
    std::fill_n(b.total, call.C, 0.0);
    for_blocks(call, [&](int64_t v0, int64_t v1) {
      on_threads(threads, [&](int64_t t) {
        call.for_own_tiles(t, v0, v1, b.z, [&](const Tile& tile) {
          k.logits(p.weight, b.columns, H, tile, call.stage(t));
          k.finish(p.map, tile, call.max(t), nullptr);
          call.pick_targets(tile);
          call.pack_weight(tile, v0, v1);
        });
      });
      sums.for_rows([&](int64_t c) {
        float most = -kInfinity;
        for (int64_t t = 0; t < threads; ++t) most = std::max(most, call.max(t)[c]);
        if (!(most > reference[c] + kLag)) return;
        const float shrink = std::exp(reference[c] - most);
        reference[c] = most;
        if (b.total[c] == 0) return;
        b.total[c] *= shrink;
        for (int64_t h = 0; h < H; ++h) u[c][h] *= shrink;
      });
      on_threads(threads, [&](int64_t t) {
        std::fill_n(call.sum(t), call.C, 0.0);
        call.for_own_tiles(t, v0, v1, b.z, [&](const Tile& tile) {
          k.exponentials(p.map, tile, reference, call.sum(t), true, call.scratch(t));
        });
      });
      for (int64_t t = 0; t < threads; ++t) {
        for (int64_t c = 0; c < call.live; ++c) b.total[c] += call.sum(t)[c];
      }
      call.hidden_gradient(v0, v1, b.z, u);
    });
    sums.for_rows([&](int64_t c) {
      const float weight = p.map.scale * row_weight[call.rows[c]], z = b.target[c];
      const float tanh_a = p.map.softcap == 0 ? 0 : z / (p.map.scale * p.map.softcap);
      const int64_t y = b.labels[c];
      const bool inside = y >= 0 && y < p.V;
      const float mean = static_cast<float>(-weight / b.total[c]), own = weight * (1 - tanh_a) * (1 + tanh_a);
      std::vector<float> target(H, 0.f);
      if (inside) k.load_row(p.weight, y, H, target.data());
      for (int64_t h = 0; h < H; ++h) u[c][h] = mean * u[c][h] + (inside ? own * target[h] : 0.f);
    });
    for (int64_t c = 0; c < call.live; ++c) call.write_logprob(c, reference[c], b.total[c], l, lse);
    sums.round_into_result(0);
  });
}

Want stored_logits_want(const Head& p, const Gradients& to) {
  Want want;
  want.all_logits = want.reduce = true;
  want.rows_panels = to.weight;
  want.weight_rows = to.hidden;
  want.hidden_rows = to.hidden && p.hidden.dtype != Dtype::kFloat32;
  return want;
}

// Logits of a chunk stay, become G where they stand, and serve dW, db and dX.
void gradients_from_stored_logits(const TileKernels& k, const Head& p, const int64_t* labels,
                                  const std::vector<int64_t>& rows, const float* row_weight, const Gradients& to,
                                  float* l, float* lse) {
  Call call(k, p, labels, static_cast<int64_t>(rows.size()), stored_logits_want(p, to));
  HiddenSums sums(call, to.hidden);
  for_chunks(call, rows, [&](int64_t) {
    call.reduce(l, lse);
    call.load_weights(row_weight, nullptr);
    if (to.hidden) sums.clear(0);
    for_blocks(call, [&](int64_t v0, int64_t v1) {
      float* z = call.b.z + v0 * call.b.ld;
      float* dW = to.weight ? static_cast<float*>(to.weight) + v0 * p.H : nullptr;
      call.weight_gradient(v0, v1, z, true, dW, true, to.bias);
      if (to.hidden) call.hidden_gradient(v0, v1, z, sums.rows(0));
    });
    if (to.hidden) sums.round_into_result(0);
  });
}

// Rows of a backward pass: those whose logits are kept, with their slots, before the others.
struct LiveRows {
  std::vector<int64_t> kept, slots, others;
  LogitStore store{};

  int64_t count() const { return static_cast<int64_t>(kept.size() + others.size()); }
};

// f(first) for each chunk, `first` being its place among all rows
template <typename F>
void for_chunks(Call& call, const LiveRows& rows, const F& f) {
  const int64_t kept = static_cast<int64_t>(rows.kept.size());
  for_chunks(call, rows.kept, f, rows.slots);
  for_chunks(call, rows.others, [&](int64_t first) { f(kept + first); });
}

Want backward_want(const Head& p, const Gradients& to, int64_t n, bool rows_outside) {
  Want want;
  want.block = true;
  want.rows_panels = to.weight;
  want.weight_rows = to.hidden;
  const bool sums_in_workspace = to.hidden && p.hidden.dtype != Dtype::kFloat32;
  want.hidden_rows = sums_in_workspace && rows_outside;
  want.all_hidden_rows = sums_in_workspace && !rows_outside ? n : 0;
  want.weight_block = to.weight && to.weight_dtype != Dtype::kFloat32;
  return want;
}

// Gradients for a known logsumexp. With dW or db wanted the vocabulary is outside, else rows are. `assign`: dW holds no
// sum to add to (but perhaps logits).
void gradients_from_lse(const TileKernels& k, const Head& p, const int64_t* labels, const LiveRows& rows,
                        const float* lse, const float* row_weight, const Gradients& to, bool assign) {
  const int64_t n = rows.count(), H = p.H;
  const bool rows_outside = !to.weight && !to.bias;
  Want want = backward_want(p, to, n, rows_outside);
  const int64_t kept = static_cast<int64_t>(rows.kept.size());
  // A tile may write its rows of dW once nobody needs the logits in their memory: after the first chunk, if that has
  // all of them.
  want.weight_block |= to.weight && kept > kMostRows;
  if (to.weight && kept > 0 && !want.weight_block) want.weight_block = require_sizes(k, p, n, want).C < kept;
  Call call(k, p, labels, n, want);
  HiddenSums sums(call, to.hidden);
  const auto step = [&](int64_t v0, int64_t v1, int64_t first, float* dW, bool add) {
    call.load_weights(row_weight, lse);
    call.weight_gradient(v0, v1, call.b.z, false, dW, add, to.bias, rows.store);
    if (to.hidden) call.hidden_gradient(v0, v1, call.b.z, sums.rows(first));
  };
  if (rows_outside) {
    for_chunks(call, rows, [&](int64_t) {
      sums.clear(0);
      for_blocks(call, [&](int64_t v0, int64_t v1) { step(v0, v1, 0, nullptr, true); });
      sums.round_into_result(0);
    });
    return;
  }
  for_blocks(call, [&](int64_t v0, int64_t v1) {
    float* dW = nullptr;
    if (want.weight_block) {
      dW = call.b.weight_sum;
    } else if (to.weight) {
      dW = static_cast<float*>(to.weight) + v0 * H;
    }
    for_chunks(call, rows, [&](int64_t first) {
      if (to.hidden && v0 == 0) sums.clear(first);
      step(v0, v1, first, dW, first > 0 || !(assign || want.weight_block));
      if (to.hidden && v1 == p.V) sums.round_into_result(first);
    });
    if (!want.weight_block) return;
    on_threads(call.sizes.threads, [&](int64_t t) {
      const Range own = part(v1 - v0, call.sizes.threads, t);
      for (int64_t v = own.begin; v < own.end; ++v) {
        k.store_row(dW + v * H, H, !assign, to.weight_dtype, row_of(to.weight, to.weight_dtype, v0 + v, H));
      }
    });
  });
}

// Whether `backward` has no room for the float32 sums of dX of that many rows: dX and dW come one after the other then.
bool sums_too_large(const Head& p, int64_t rows) {
  return p.hidden.dtype != Dtype::kFloat32 && rows * p.H * static_cast<int64_t>(sizeof(float)) > p.workspace_bytes / 3;
}

}  // namespace

LogitStore LogitStore::in(void* weight_gradient, Dtype dtype, int64_t H) {
  const int64_t row_bytes = H * element_size(dtype), size = sizeof(float);
  const int64_t slots = row_bytes % size == 0 ? row_bytes / size : 0;
  return {weight_gradient, row_bytes, slots >= kFewestKeptRows ? slots : 0};
}

int64_t kept_rows(const Head& p, Dtype weight_gradient) {
  const int64_t slots = LogitStore::in(nullptr, weight_gradient, p.H).slots;
  // With dX and dW one after the other a row costs five products and a kept one three, where four do without keeping.
  const bool apart = weight_gradient != Dtype::kFloat32 && sums_too_large(p, p.N);
  return apart && 2 * slots <= p.N ? 0 : slots;
}

void logprob(const Head& p, const int64_t* labels, const LogitStore& keep, float* l, float* lse) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  const std::vector<int64_t> rows = scored_rows(p, labels);
  if (rows.empty()) return;
  Want want;
  want.own_tiles = want.reduce = true;
  Call call(k, p, labels, static_cast<int64_t>(rows.size()), want);
  if (keep.data) populate(keep.data, p.V * keep.row_bytes, call.sizes.threads);
  for_chunks(call, rows, [&](int64_t first) { call.reduce(l, lse, keep, first); });
}

void logprob_and_grad(const Head& p, const int64_t* labels, const float* row_weight, const Gradients& to, float* l,
                      float* lse) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  const std::vector<int64_t> rows = scored_rows(p, labels);
  if (rows.empty()) return;
  const bool weight_side = to.weight || to.bias;
  if (weight_side && (!to.weight || to.weight_dtype == Dtype::kFloat32)) {
    Sizes sizes{};
    const int64_t n = static_cast<int64_t>(rows.size());
    const bool fits = find_sizes(k, p, n, stored_logits_want(p, to), sizes);
    if (fits && sizes.C >= std::min(n, kFewestStoredRows)) {
      return gradients_from_stored_logits(k, p, labels, rows, row_weight, to, l, lse);
    }
  }
  if (to.hidden) {
    hidden_from_one_pass(k, p, labels, rows, row_weight, to.hidden, l, lse);
  } else {
    logprob(p, labels, {}, l, lse);
  }
  if (weight_side) backward(p, labels, lse, row_weight, {nullptr, to.weight, to.weight_dtype, to.bias}, nullptr);
}

void backward(const Head& p, const int64_t* labels, const float* lse, const float* row_weight, const Gradients& to,
              const int64_t* kept) {
  const TileKernels& k = select_kernels(p.hidden.dtype);
  LiveRows rows;
  rows.store = LogitStore::in(to.weight, to.weight_dtype, p.H);
  int64_t slot = 0;
  for (int64_t t = 0; t < p.N; ++t) {
    const bool is_kept = kept && kept[t] != kIgnoreIndex;
    if (labels[t] != kIgnoreIndex && row_weight[t] != 0) {
      if (is_kept) rows.slots.push_back(slot);
      (is_kept ? rows.kept : rows.others).push_back(t);
    }
    slot += is_kept;
  }
  const bool assign = kept != nullptr;
  if (rows.count() == 0 || !(to.hidden || to.weight || to.bias)) {
    if (assign) std::memset(to.weight, 0, p.V * rows.store.row_bytes);
    return;
  }
  const bool both = to.hidden && (to.weight || to.bias);
  if (both && sums_too_large(p, rows.count())) {
    gradients_from_lse(k, p, labels, rows, lse, row_weight, {to.hidden, nullptr, to.weight_dtype, nullptr}, false);
    gradients_from_lse(k, p, labels, rows, lse, row_weight, {nullptr, to.weight, to.weight_dtype, to.bias}, assign);
    return;
  }
  gradients_from_lse(k, p, labels, rows, lse, row_weight, to, assign);
}

}  // namespace infopo
