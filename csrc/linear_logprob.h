// The three primitives over rows. With X [N, H], W [V, H], b [V], labels y [N], row weights c [N]:
//
//     a_tv  = X_t . W_v + b_v                  z_tv = scale * softcap * tanh(a_tv / softcap)   (scale * a_tv without)
//     lse_t = log sum_v exp(z_tv)              l_t  = z_{t,y_t} - lse_t
//     G_tv  = c_t * (1[v = y_t] - exp(z_tv - lse_t)) * dz_tv / da_tv
//     dX    = G W        dW += G^T X        db += G^T 1
//
// Rows with y = kIgnoreIndex cost nothing: their l and lse are 0, their rows of X and dX are not touched. X, W and dX are
// of one type out of three, dW of that type or float32, the rest float32. Pointers of results that nobody wants are null.
#pragma once

#include <cstdint>

#include "logit_store.h"
#include "tile_kernels.h"

namespace infopo {

constexpr int64_t kIgnoreIndex = -100;

struct Head {
  Matrix hidden;  // [N, H]
  Matrix weight;  // [V, H]
  int64_t N, V, H;
  LogitMap map;
  int64_t workspace_bytes;  // bound on what a call allocates beyond results and vectors of length N
};

struct Gradients {
  void* hidden = nullptr;  // [N, H] contiguous, type of Head::hidden; rows are assigned
  void* weight = nullptr;  // [V, H] contiguous, weight_dtype; added to
  Dtype weight_dtype = Dtype::kFloat32;
  float* bias = nullptr;  // [V]; added to

  Gradients without_hidden() const { return {.weight = weight, .weight_dtype = weight_dtype, .bias = bias}; }
};

// Rows whose logits the memory of a weight gradient of that type can hold; 0 where keeping them does not pay.
int64_t kept_rows(const Head&, Dtype weight_gradient);

// At most `keep.slots` rows are scored, if it is given.
void logprob(const Head&, const int64_t* labels, const LogitStore& keep, float* l, float* lse);

void logprob_and_grad(const Head&, const int64_t* labels, const float* row_weight, const Gradients&, float* l,
                      float* lse);

// The labels with which `logprob` kept logits in the memory of the weight gradient, which is assigned then, not added
// to. Said apart from the pointer: that of no rows may be null.
struct Kept {
  bool any = false;
  const int64_t* labels = nullptr;  // [N]
};

void backward(const Head&, const int64_t* labels, const float* lse, const float* row_weight, const Gradients&,
              const Kept&);

}  // namespace infopo
