// The three primitives over rows. With X [N, H], W [V, H], b [V], labels y [N], row weights c [N]:
//
//     a_tv  = X_t . W_v + b_v                  z_tv = scale * softcap * tanh(a_tv / softcap)   (scale * a_tv without)
//     lse_t = log sum_v exp(z_tv)              l_t  = z_{t,y_t} - lse_t
//     G_tv  = c_t * (1[v = y_t] - exp(z_tv - lse_t)) * dz_tv / da_tv
//     dX    = G W        dW += G^T X        db += G^T 1
//
// Rows with y = kIgnoreIndex cost nothing: their l and lse are 0, and their rows of X and dX are not touched. Rows with
// y = kElsewhere have their label in another part of the vocabulary: l = -lse, and no v is y. X, W and dX have the same
// type, one of three. dW has that type or float32; the rest is float32. A result that is not wanted has a null pointer.
#pragma once

#include <cstdint>

#include "logit_store.h"
#include "tile_kernels.h"

namespace infopo {

constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kElsewhere = -(int64_t{1} << 62);

struct Head {
  Matrix hidden;  // [N, H]
  Matrix weight;  // [V, H]
  int64_t N, V, H;
  LogitMap map;
  int64_t workspace_bytes;   // bound on the memory of a call beyond results and vectors of length N
  float tail_threshold = 0;  // 0 for exact gradients; pooled_tail.h has the definition
};

// What a call with a threshold pooled; null if it is not wanted.
struct TailReport {
  float* mass = nullptr;      // [N] probability of the pooled words; assigned for rows with a gradient
  double* columns = nullptr;  // [2] += columns that were kept, and all
};

struct Gradients {
  void* hidden = nullptr;  // [N, H] contiguous, type of Head::hidden; a call assigns rows
  void* weight = nullptr;  // [V, H] contiguous, weight_dtype; a call adds to it
  Dtype weight_dtype = Dtype::kFloat32;
  float* bias = nullptr;  // [V]; a call adds to it
  TailReport tail = {};

  Gradients without_hidden() const {
    return {.weight = weight, .weight_dtype = weight_dtype, .bias = bias, .tail = tail};
  }
};

// Number of rows whose logits fit in the memory of the weight gradient, and beside it in the workspace; 0 where keeping
// them does not pay. Reads no memory.
int64_t kept_rows(const Head&, const Gradients&);

// If `keep` is given, `labels` score at most `keep.all_slots()` rows.
void logprob(const Head&, const int64_t* labels, const LogitStore& keep, float* l, float* lse);

void logprob_and_grad(const Head&, const int64_t* labels, const float* row_weight, const Gradients&, float* l,
                      float* lse);

// The labels with which `logprob` kept logits in the memory of the weight gradient. `backward` then assigns the
// gradient instead of adding to it. `any` is separate from the pointer, because the pointer of an empty tensor may be
// null.
struct Kept {
  bool any = false;
  const int64_t* labels = nullptr;  // [N]
  LogitStore store;
};

void backward(const Head&, const int64_t* labels, const float* lse, const float* row_weight, const Gradients&,
              const Kept&);

}  // namespace infopo
