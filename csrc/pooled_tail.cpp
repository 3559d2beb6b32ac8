#include "pooled_tail.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "threads.h"

namespace infopo {
namespace {

// All words of a tile are kept if more than this share would be: then the exact product is as fast (2 cores of Emerald
// Rapids, H 576, V 49152, 512 rows: 0.98 of its time at a share of 0.75, float32).
constexpr float kExactAbove = 0.75f;

// What a row of the compact tile stands for: a word of the block, the pool of tile j as -1 - j, or nothing.
constexpr int64_t kPadding = INT64_MIN;

class Block {
 public:
  Block(const Chunk& chunk, int64_t v0, int64_t v1, const Chunk::BlockGradient& to, bool hidden,
        const TailReport& report)
      : chunk_(chunk),
        k_(chunk.k),
        p_(chunk.p),
        b_(chunk.b),
        v0_(v0),
        v1_(v1),
        to_(to),
        hidden_(hidden),
        report_(report) {}

  // Forms G of the block, moves its rows to the front of each thread's part, and adds dW and db.
  void form() {
    on_threads(chunk_.sizes.threads, [&](int64_t t) {
      const Range own = part(v1_ - v0_, chunk_.sizes.threads, t, kTailTile);
      if (report_.mass) std::fill_n(mass(t), chunk_.C, 0.f);
      int64_t rows = 0, done = 0, kept = 0;
      // Logits that are formed here stay in a small tile in the cache; only kept rows and pools reach the block.
      chunk_.for_own_tiles(t, v0_, v1_, to_.have_logits ? to_.z : nullptr, kTailTile, kTailTile, [&](const Tile& tile) {
        chunk_.form_logits(tile, t, to_);
        const int64_t v = tile.v0 - v0_, at = own.begin + rows;
        const Tail tail{.log_threshold = std::log(p_.tail_threshold),
                        .exact_above = kExactAbove,
                        .share = b_.tail.share + v,
                        .pooled = thread_row(t, 0),
                        .mass = report_.mass ? mass(t) : nullptr};
        const int64_t n = k_.pool(p_.map, tile, chunk_.live, b_.labels, b_.lse, b_.coefficient, to_.db,
                                  chunk_.scratch(t), tail, to_.z + at * b_.ld);
        int64_t* words = b_.tail.words + at;
        for (int64_t i = 0; i < tile.rows; ++i) {
          if (tail.share[i] == kKept) *words++ = v + i;
        }
        rows += n;
        kept += n;
        if (n < tile.rows) {
          const int64_t pool = v / kTailTile;
          *words = -1 - pool;
          ++rows;
          if (hidden_) k_.tail_mean(p_.weight, tile.v0, tile.rows, tail.share, p_.H, b_.tail.means + pool * p_.H);
        }
        if (rows - done >= kTailTile) done += settle(t, own, done, (rows - done) / k_.block * k_.block);
      });
      settle(t, own, done, rows - done);
      b_.tail.counts[2 * t] = rows;
      b_.tail.counts[2 * t + 1] = kept;
    });
  }

  // Adds dX, a piece of rows of the compact tile at a time.
  void add_hidden(float* const* out) {
    const bool all_kept = everything_kept();
    if (all_kept && !b_.tail.panels && reads_weight_in_place(k_, p_)) {
      return chunk_.hidden_gradient(v0_, v1_, to_.z, out);
    }
    const int64_t K = all_kept ? v1_ - v0_ : close_gaps();
    for (int64_t k0 = 0; k0 < K; k0 += b_.tail.piece) {
      const int64_t n = std::min(b_.tail.piece, K - k0);
      on_threads(chunk_.sizes.threads, [&](int64_t t) {
        const Range own = part(n, chunk_.sizes.threads, t, k_.block);
        if (b_.tail.panels && all_kept) {
          k_.pack_rows(p_.weight, nullptr, v0_ + k0, own.begin, own.end, std::min(n, v1_ - v0_ - k0), p_.H,
                       b_.tail.panels);
          return;
        }
        for (int64_t i = own.begin; i < own.end; ++i) gather(b_.tail.words[k0 + i], i);
        if (b_.tail.panels) {
          const Matrix rows{b_.tail.gathered, p_.H, p_.weight.dtype};
          k_.pack_rows(rows, nullptr, 0, own.begin, own.end, n, p_.H, b_.tail.panels);
        }
      });
      const int64_t tasks = product_tasks(k_, chunk_.live, p_.H);
      on_threads(chunk_.sizes.threads, [&](int64_t t) {
        const Range own = part(tasks, chunk_.sizes.threads, t);
        k_.multiply({.M = chunk_.live,
                     .N = p_.H,
                     .K = n,
                     .a = to_.z + k0 * b_.ld,
                     .lda = b_.ld,
                     .a_by_column = true,
                     .b = b_.tail.panels ? b_.tail.panels : static_cast<const float*>(b_.tail.gathered),
                     .ldb = b_.tail.panels ? 0 : b_.tail.stride,
                     .b_rows = n,
                     .out = out,
                     .accumulate = true,
                     .task_begin = own.begin,
                     .task_end = own.end});
      });
    }
  }

  void report() const {
    if (report_.columns) {
      for (int64_t t = 0; t < chunk_.sizes.threads; ++t)
        report_.columns[0] += static_cast<double>(b_.tail.counts[2 * t + 1]);
      report_.columns[1] += static_cast<double>(v1_ - v0_);
    }
    if (!report_.mass) return;
    for (int64_t c = 0; c < chunk_.live; ++c) {
      if (b_.coefficient[c] == 0) continue;
      float& q = report_.mass[chunk_.rows[c]];
      if (v0_ == 0) q = 0;
      for (int64_t t = 0; t < chunk_.sizes.threads; ++t) q += mass(t)[c];
    }
  }

 private:
  float* thread_row(int64_t t, int64_t i) const { return b_.tail.rows + (2 * t + i) * chunk_.C; }
  float* mass(int64_t t) const { return thread_row(t, 1); }

  // Settles rows [first, first + n) of thread t's compact rows, and adds their part of dW. Returns n.
  int64_t settle(int64_t t, const Range& own, int64_t first, int64_t n) {
    if (n <= 0) return 0;
    const int64_t at = own.begin + first;
    const Tile tile{
        .z = to_.z + at * b_.ld, .ld = b_.ld, .rows = n, .C = chunk_.C, .v0 = v0_ + at, .by_column = hidden_};
    k_.settle(tile, chunk_.scratch(t));
    if (!to_.dW) return n;
    float** out = b_.tail.out + at;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t word = b_.tail.words[at + i];
      out[i] = word >= 0 ? to_.dW + word * p_.H : b_.tail.pools + (-1 - word) * p_.H;
      if (word < 0 && to_.add) std::memset(out[i], 0, p_.H * sizeof(float));
    }
    k_.multiply({.M = n,
                 .N = p_.H,
                 .K = chunk_.live,
                 .a = tile.z,
                 .lda = tile.ld,
                 .b = b_.rows,
                 .b_rows = chunk_.live,
                 .out = out,
                 .accumulate = to_.add,
                 .task_end = product_tasks(k_, n, p_.H)});
    for (int64_t i = 0; i < n; ++i) {
      if (b_.tail.words[at + i] >= 0) continue;
      const int64_t v = (-1 - b_.tail.words[at + i]) * kTailTile;
      k_.spread_tail(b_.tail.share + v, std::min(kTailTile, v1_ - v0_ - v), out[i], p_.H, to_.add, to_.dW + v * p_.H);
    }
    return n;
  }

  bool everything_kept() const {
    int64_t kept = 0;
    for (int64_t t = 0; t < chunk_.sizes.threads; ++t) kept += b_.tail.counts[2 * t + 1];
    return kept == v1_ - v0_;
  }

  // Moves the compact rows of all threads together, each part padded to whole blocks. Returns their number.
  int64_t close_gaps() {
    const int64_t threads = chunk_.sizes.threads, width = ceil_div(b_.ld, threads);
    int64_t K = 0;
    for (int64_t t = 0; t < threads; ++t) {
      const Range own = part(v1_ - v0_, threads, t, kTailTile);
      const int64_t n = b_.tail.counts[2 * t];
      std::memmove(b_.tail.words + K, b_.tail.words + own.begin, n * sizeof(int64_t));
      K += n;
      for (; K % k_.block; ++K) b_.tail.words[K] = kPadding;
    }
    on_threads(threads, [&](int64_t t) {  // a share of the columns: rows of one part land where another part was
      const int64_t first = std::min(b_.ld, t * width), last = std::min(b_.ld, first + width);
      int64_t to = 0;
      for (int64_t s = 0; s < threads; ++s) {
        const int64_t from = part(v1_ - v0_, threads, s, kTailTile).begin,
                      n = round_up(b_.tail.counts[2 * s], k_.block);
        for (int64_t i = 0; i < n && to != from; ++i) {
          std::memcpy(to_.z + (to + i) * b_.ld + first, to_.z + (from + i) * b_.ld + first,
                      (last - first) * sizeof(float));
        }
        to += n;
      }
    });
    return K;
  }

  // Row i of the gathered rows of W: floats if products read them in place, else the type of W.
  void gather(int64_t word, int64_t i) const {
    if (!b_.tail.panels) {
      float* row = static_cast<float*>(b_.tail.gathered) + i * b_.tail.stride;
      if (word >= 0) {
        k_.load_row(p_.weight, v0_ + word, p_.H, row);
      } else {
        std::memcpy(row, b_.tail.means + (-1 - word) * p_.H, p_.H * sizeof(float));
      }
      return;
    }
    void* row = result_row(b_.tail.gathered, p_.weight.dtype, i, p_.H);
    const int64_t bytes = p_.H * element_size(p_.weight.dtype);
    if (word >= 0) {
      std::memcpy(row, result_row(const_cast<void*>(p_.weight.data), p_.weight.dtype, v0_ + word, p_.weight.stride),
                  bytes);
    } else if (word == kPadding) {
      std::memset(row, 0, bytes);
    } else {
      k_.store_row(b_.tail.means + (-1 - word) * p_.H, p_.H, false, p_.weight.dtype, row);
    }
  }

  const Chunk& chunk_;
  const TileKernels& k_;
  const Head& p_;
  const Buffers& b_;
  const int64_t v0_, v1_;
  const Chunk::BlockGradient& to_;
  const bool hidden_;
  const TailReport& report_;
};

}  // namespace

void pooled_gradient(const Chunk& chunk, int64_t v0, int64_t v1, const Chunk::BlockGradient& to, float* const* hidden,
                     const TailReport& report) {
  Block block(chunk, v0, v1, to, hidden != nullptr, report);
  block.form();
  if (hidden) block.add_hidden(hidden);
  block.report();
}

}  // namespace infopo
