// Logits that stay between `logprob` and `backward`: in the memory of a weight gradient to which nothing has been added,
// until the gradient is written, and in memory beside it. Each row that was scored when they were kept has a slot.
//
// Kernels whose products take floats keep floats: row v of the gradient holds z[v][slot]. Kernels whose products take
// pairs of bfloat16 keep float16 numbers relative to a reference for each slot and group of words,
//
//     kept[v][slot] = float16(z[v][slot] - reference[v / kGroup][slot]),
//
// with the largest logit so far as the reference, in float32: differences of logits of any size fit float16 then. The
// error of p = exp(z - lse) is at most |log(p / largest p so far)| 2^-11, so for the words that matter it is far below
// the rounding of G to bfloat16, 2^-9.
#pragma once

#include <cstdint>

#include "tile_kernels.h"

namespace infopo {

// With fewer slots than this, the additional pass over W takes longer than the product that it saves.
constexpr int64_t kFewestKeptRows = 64;

struct LogitStore {
  static constexpr int64_t kGroup = 96;  // words that share a reference

  char* data = nullptr;  // memory of a gradient [V, H], contiguous; null for none
  int64_t row_bytes = 0;
  int64_t size = 4;   // bytes of a logit
  int64_t slots = 0;  // in a row of the gradient, then in a row beside it
  int64_t slots_beside = 0;
  float* reference = nullptr;  // [groups, slots + slots_beside], for float16 logits
  uint16_t* beside = nullptr;  // [V, slots_beside]

  // Whether float16 holds all differences of logits whose slope is not 0: without a softcap p is 0 where it does not.
  static bool narrow_holds(const LogitMap& map);

  // Slots in a row of a gradient of this type; 0 if they are too few, or if logits would lie across rows.
  static int64_t slots_of_row(const TileKernels&, Dtype weight_gradient, int64_t H);

  // The store in a gradient of this type. `beside` has `numbers` 16-bit numbers: references and rows.
  static LogitStore in(const TileKernels&, void* weight_gradient, Dtype dtype, int64_t V, int64_t H, void* beside,
                       int64_t numbers);

  // Number of 16-bit numbers in the memory beside a gradient, for that many rows; 0 if it needs none.
  static int64_t numbers_beside(const TileKernels&, Dtype weight_gradient, int64_t V, int64_t H, int64_t rows);

  bool exists() const { return data || beside; }
  int64_t all_slots() const { return slots + slots_beside; }
  int64_t groups(int64_t V) const { return ceil_div(V, kGroup); }

  // References of the group of word v.
  float* references(int64_t v) const { return reference + v / kGroup * all_slots(); }

  // Calls f(memory of slot `first`, offset, n) for slots [first, first + n) of word v: once, or for both memories.
  template <typename F>
  void for_parts(int64_t v, int64_t first, int64_t n, const F& f) const {
    const int64_t inside = first >= slots ? 0 : first + n <= slots ? n : slots - first;
    if (inside) f(data + v * row_bytes + first * size, 0, inside);
    if (inside < n) f(reinterpret_cast<char*>(beside + v * slots_beside + first + inside - slots), inside, n - inside);
  }

  // Maps the memory of V rows at once. It is about to be written for the first time, and page faults during products
  // take longer: 2.7 s instead of 2.0 for `backward` of 512 rows with a float32 dW of 1 GiB (2 cores of Emerald Rapids,
  // virtual machine). On systems without this call the page faults come as usual.
  void populate(int64_t V, int64_t threads) const;
};

}  // namespace infopo
