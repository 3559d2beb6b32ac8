// The schedules: loops over chunks of C rows and blocks of Vb vocabulary entries. The last column counts products of
// size N V H. "Outside" means the outer loop.
//
//   logprob                    rows outside; each thread takes a slice of the vocabulary              1
//   hidden_from_one_pass       rows outside; a block's exponentials, relative to the largest logit    2
//                              so far, are multiplied with W at once
//   from_stored_logits         rows outside; the chunk's logits [V, C] stay in the workspace          3
//   from_lse                   vocabulary outside, rows inside: a block of dW is finished and         3 (2 with
//                              rounded before the next begins; dX adds up in float32                  one result)
//
// Two primitives combine schedules:
//
//   logprob_and_grad, 16-bit dW                             hidden_from_one_pass, from_lse for dW     4
//   backward, float32 sums of dX too large for the          from_lse for dX (rows outside), then      4
//   workspace                                               for dW
//
// If `logprob` kept the logits of a row in the memory of dW, `backward` takes one product less for that row: each tile
// reads the logits from there before it writes its own rows of dW.
#pragma once

#include <cstdint>
#include <vector>

#include "linear_logprob.h"
#include "workspace.h"

namespace infopo {

// Forms dX alone, and l and lse.
void hidden_from_one_pass(const TileKernels&, const Head&, const int64_t* labels, const std::vector<int64_t>& rows,
                          const float* row_weight, void* dX, float* l, float* lse);

// Whether enough rows of whole logits fit the workspace, so that storing logits is faster than forming them again.
bool stored_logits_fit(const TileKernels&, const Head&, int64_t rows, const Gradients&);

// Forms float32 dW, db and dX, and l and lse.
void from_stored_logits(const TileKernels&, const Head&, const int64_t* labels, const std::vector<int64_t>& rows,
                        const float* row_weight, const Gradients&, float* l, float* lse);

// Rows of a backward pass: first those with kept logits, with their slots, then the others.
struct LiveRows {
  std::vector<int64_t> kept, slots, others;
  LogitStore store;

  int64_t count() const { return static_cast<int64_t>(kept.size() + others.size()); }
};

// Whether `from_lse` has room for n rows, at least one at a time.
bool from_lse_fits(const TileKernels&, const Head&, const Gradients&, int64_t n);

// Forms gradients for a known logsumexp. If dW or db is wanted, the vocabulary is outside, else the rows are. `assign`:
// dW holds no sum to add to (but it may hold logits).
void from_lse(const TileKernels&, const Head&, const int64_t* labels, const LiveRows&, const float* lse,
              const float* row_weight, const Gradients&, bool assign);

}  // namespace infopo
